"""A cohort on disk: `cohort.json` (what the peers are) and `peers/NN-name.safetensors` (their
weights and nothing else). Saving holds two copies of one peer in memory at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdml.absent_tensors import absence, local_part
from fastdml.cohort_teachers import Identity
from fastdml.errors import InputError, one_line, require
from fastdml.files import Staged, safe_name, writing
from fastdml.image_record import FIELDS, checked_record
from fastdml.models import ReidHead
from fastdml.models.create import check_count
from fastdml.paths import expanded
from fastdml.peer_groups import check_groups

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

FORMAT = 1  # of cohort.json
LONGEST_NAME = 231  # bytes of a peer's name in a file's, whose temporary name may have 255


def save(cohort: Cohort, folder: str | os.PathLike) -> None:
    """Writes cohort.json and the weights: see `Cohort.save`."""
    check_savable(cohort)
    folder = expanded(folder)
    with writing(folder), Staged() as staged:
        digests = stage_peers(cohort, range(len(cohort)), folder, staged)
        stage_description(cohort, digests, folder, staged)


def stage_peers(
    cohort: Cohort, numbers: Iterable[int], folder: Path, staged: Staged
) -> dict[int, str]:
    """Writes the weights of these peers, and returns the SHA-256 of their files. Raises OSError."""
    return {
        k: stage_peer(k, cohort.names[k], cohort.peers[k].state_dict(), folder, staged)
        for k in numbers
    }


def stage_peer(
    k: int, name: str, weights: Mapping[str, Tensor], folder: Path, staged: Staged
) -> str:
    """Writes the weights of one peer, and returns the SHA-256 of the file. Raises OSError."""
    safetensors = require("safetensors.torch", "train")
    (folder / "peers").mkdir(parents=True, exist_ok=True)
    # A copy per tensor: safetensors wants them contiguous and refuses shared storage.
    data = safetensors.save(
        {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in weights.items()
        }
    )
    staged.write(folder / peer_file(k, name), data)
    return hashlib.sha256(data).hexdigest()


def stage_description(
    cohort: Cohort, digests: Mapping[int, str], folder: Path, staged: Staged
) -> None:
    """Writes cohort.json, to get its name after the files of all peers. Raises OSError."""
    description = describe(cohort)
    for k, entry in enumerate(description["peers"]):
        entry["sha256"] = digests[k]
    staged.write(folder / "cohort.json", json.dumps(description, indent=2).encode())


def describe(cohort: Cohort) -> dict[str, Any]:
    """What cohort.json says, in plain values, without the digests of files."""
    models = zip(cohort.names, cohort.models, strict=True)
    teachers = [identity._asdict() for identity in cohort.taught_by]
    return {
        "format": FORMAT,
        "num_classes": cohort.num_classes,
        "in_channels": int(cohort.in_channels),
        "head": cohort.head and dataclasses.asdict(cohort.head),
        "image_size": cohort.image_size,
        **cohort.record(),
        **({"groups": cohort.groups} if cohort.groups > 1 else {}),
        "peers": [{"name": name, "model": model, "sha256": ""} for name, model in models],
        **({"teachers": teachers} if teachers else {}),
    }


def check_savable(cohort: Cohort, *, shards: bool = False) -> None:
    """Raises InputError for peers that the files cannot hold: see `Cohort.check_savable`. shards:
    some weights may be, which are made whole one peer after the other."""
    safetensors = require("safetensors.torch", "train")
    for name, peer in zip(cohort.names, cohort.peers, strict=True):
        for key, value in peer.state_dict().items():
            if not isinstance(value, Tensor):
                raise InputError(
                    f"{key} of peer {name} is a {type(value).__name__}, and the files of a "
                    "cohort hold tensors: let get_extra_state return one, or save with "
                    "torch.save(cohort.state_dict(), path)"
                )
            if (why := absence(value, shards=shards)) is not None:
                raise InputError(f"{key} of peer {name} is {why}")
            try:
                safetensors.save({key: local_part(value).new_empty(0, device="cpu")})
            except Exception:  # of several kinds, and of tensor subclasses' own
                kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
                raise InputError(
                    f"{key} of peer {name} is a tensor ({kind}) that safetensors cannot hold: "
                    "save with torch.save(cohort.state_dict(), path)"
                ) from None


def read_description(path: Path) -> dict[str, Any]:
    """The content of a cohort.json, checked: see `checked_description`."""
    return checked_description(lambda: json.loads(read_file(path)), path)


def checked_description(read: Callable[[], dict[str, Any]], path: Path) -> dict[str, Any]:
    """What `read` gives of a file, checked; its head as a ReidHead, None where there is none.

    path: of the file, for messages. Raises InputError.
    """
    try:
        description = read()
        version = description["format"]
        peers = [(e["name"], e["model"], e["sha256"]) for e in description["peers"]]
        sizes = (description["num_classes"], description["in_channels"])
        head = description.get("head")  # earlier versions wrote neither this
        description["head"] = None if head is None else ReidHead(**head)
        size = description.get("image_size")  # nor this, nor the record of the images
        description["image_size"] = None if size is None else height_and_width(size)
        description["groups"] = description.get("groups", 1)
        check_groups(description["groups"], [model or "" for _, model, _ in peers])
        teachers = [Identity(**entry) for entry in description.get("teachers", [])]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        text = not isinstance(error, UnicodeDecodeError)  # which holds the whole file
        reason = repr(error) if text else "not a text file"
        raise InputError(f"{path} does not describe a cohort: {reason}") from None
    if version != FORMAT:
        raise InputError(f"{path} has format {version!r}; this version of fastdml reads {FORMAT}")
    texts = [t for n, m, sha256 in peers for t in (n, "" if m is None else m, sha256)]
    texts += ["" if text is None else text for teacher in teachers for text in teacher]
    description["teachers"] = teachers
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int) for n in sizes):
        raise InputError(f"{path} does not describe a cohort: a name or a number is of wrong type")
    try:
        record = {name: description.get(name) for name in FIELDS}
        return description | checked_record(record, description["num_classes"])
    except InputError as error:
        raise InputError(f"{path} does not describe a cohort: {error}") from None


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """`Cohort.record` of what `save` wrote, without the weights."""
    description = read_description(expanded(folder) / "cohort.json")
    return {name: description[name] for name in FIELDS}


def height_and_width(size: Sequence[int]) -> tuple[int, int]:
    """An `image_size` from a caller or a file, checked."""
    size = tuple(size)
    if len(size) != 2:
        raise InputError(f"image_size must be (height, width), not {size}")
    for number in size:
        check_count("image_size", number)
    return size


def peer_file(k: int, name: str) -> str:
    """The file of peer k; the number tells apart names that are equal once cleaned."""
    return f"peers/{k:02d}-{safe_name(name, LONGEST_NAME)}.safetensors"


def read_peer(folder: Path, k: int, entry: dict[str, str]) -> tuple[dict[str, Tensor], Path]:
    """The weights of a peer and their file, which is the one that cohort.json means."""
    path = folder / peer_file(k, entry["name"])
    data = read_file(path)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InputError(
            f"{path} is not the file that cohort.json was written with (truncated, changed, or "
            "from an interrupted save): save the cohort again"
        )
    safetensors = require("safetensors.torch", "train")
    try:
        return safetensors.load(data), path
    except Exception as error:  # a damaged or forged header can raise nearly anything
        reason = one_line(error)
        raise InputError(f"{path} holds no safetensors that can be read: {reason}") from None


def load_peer(peer: nn.Module, name: str, weights: dict[str, Tensor], path: Path) -> None:
    """Puts weights that were read from `path` into `peer`, the cohort's peer called `name`."""
    absent = any(t.is_meta for t in chain(peer.parameters(), peer.buffers()))
    if absent:  # it takes the loaded ones for its own
        weights = {key: t.clone() for key, t in weights.items()}
    try:
        peer.load_state_dict(weights, assign=absent)
    except RuntimeError as error:  # names every missing, surplus or misshapen tensor
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not fit peer {name}: {reason}") from None
    for key, t in chain(peer.named_parameters(), peer.named_buffers()):
        if (why := absence(t)) is not None:  # a buffer that no file has
            raise InputError(f"{key} of peer {name} is {why}")


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
