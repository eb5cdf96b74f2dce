"""The cohort: K peers as one module, on disk and for export.

A cohort on disk is `cohort.json` (what the peers are) and `peers/NN-name.safetensors` (their
weights and nothing else). Building K peers costs their initialisation on the CPU; saving holds
two copies of one peer in memory at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, combinations
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdml.errors import InputError, one_line, require
from fastdml.files import Staged, safe_name, write_atomically, writing
from fastdml.models import ReidHead, check_count, create_model, is_own
from fastdml.paths import expanded
from fastdml.tensors import absence, lacks_values

FORMAT = 1  # of cohort.json
RECORD = ("image_shape", "mean", "std", "classes")  # what peers know of the images they learnt from
REMEDY = "wrap it in a module that returns {it}"  # where a peer returns more than its logits
LONGEST_NAME = 231  # bytes of a name in one of a file, which may have 255 while it is written


class Cohort(nn.Module):
    """K peers that see the same images and give K logits of the same shape.

    peers: names for `create_model`, modules, or a mix. A module that is built twice from one seed,
    or passed twice, would learn nothing from its twin and is refused.
    num_classes: needed where the peers are names.
    seed: peer k is built from (seed, k) alone, whatever its neighbours are; torch's global
    generator is left as it was.
    head: the re-identification head that peers given by name get; `embed` and metric losses need
    one. A module brings its own (`logits_and_features` and `embed`, as `ReidModel` has them).
    pretrained: peers begin with timm's weights; all must be models of timm.
    image_size: (height, width) that timm's networks of one size are built for.

    Attributes: `peers`, the modules; `names`, unique names for display; `models`, the name each
    peer was built from (None for a module); `num_classes`; `in_channels`; `head`; `image_size`.

    What the images were that the peers learnt from, each None until it is known. Training records
    it at the first batch, as far as the batches say; set what they do not say before training.
    `save`, `load` and `export` keep it:
    image_shape: (channels, height, width) of a batch's images, after any resizing and cropping.
    mean, std: a number a channel, that a pixel is normalised by, in units of the pixel as it is
        stored: 0 to 255 for bytes (digits: 0 to 16).
    classes: a name for each of the `num_classes` logits, in their order.
    """

    peers: nn.ModuleList
    names: list[str]
    models: list[str | None]
    num_classes: int
    in_channels: int
    head: ReidHead | None
    image_size: tuple[int, int] | None
    image_shape: Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    classes: Sequence[str] | None

    def __init__(
        self,
        peers: Sequence[str | nn.Module],
        num_classes: int | None = None,
        *,
        in_channels: int = 3,
        seed: int = 0,
        head: ReidHead | None = None,
        pretrained: bool = False,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        peers = _listed(peers)
        if not peers:
            raise InputError("a cohort needs at least one peer; name one, such as resnet32")
        if not isinstance(seed, Integral) or seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, not {seed!r}")
        if num_classes is not None:
            check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        if image_size is not None:
            image_size = _height_and_width(image_size)

        self.models = [peer if isinstance(peer, str) else None for peer in peers]
        self.names = _unique([p if isinstance(p, str) else type(p).__name__ for p in peers])
        self.in_channels = in_channels
        self.head = head
        self.image_size = image_size
        self.image_shape = self.mean = self.std = self.classes = None
        self.num_classes = int(self._common_class_count(peers, num_classes))
        self.peers = nn.ModuleList(
            _build(p, self.num_classes, in_channels, seed, k, head, pretrained, image_size)
            if isinstance(p, str)
            else p
            for k, p in enumerate(peers)
        )
        self._check_peers_differ()

    def __len__(self) -> int:
        return len(self.peers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (N, in_channels, H, W) -> K logits (N, C)."""
        logits = tuple(peer(x) for peer in self.peers)
        for name, z in zip(self.names, logits, strict=True):
            check_logits(name, z, x, self.num_classes, REMEDY)
        return logits

    def ensemble(self, x: Tensor) -> Tensor:
        """Mean of the peers' probabilities in float32, (N, C)."""
        return torch.stack([z.float().softmax(dim=1) for z in self(x)]).mean(dim=0)

    def embed(self, x: Tensor) -> list[Tensor]:
        """x: (N, in_channels, H, W) -> K tensors (N, D_k): what each peer compares images by."""
        for name, peer in zip(self.names, self.peers, strict=True):
            if not hasattr(peer, "embed"):
                raise InputError(
                    f"peer {name} has no re-identification head: build the cohort with "
                    "head=ReidHead()"
                )
        return [peer.embed(x) for peer in self.peers]

    def record(self) -> dict[str, list | None]:
        """`image_shape`, `mean`, `std` and `classes` as plain lists; refused where they are not of
        their kind, or do not fit each other."""
        return _checked_record({name: getattr(self, name) for name in RECORD}, self.num_classes)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes cohort.json and the weights; an interrupted save never leaves a file half written.

        Files are completed under temporary names first and renamed together; cohort.json comes
        last and holds each file's SHA-256, so `load` notices a mix of two saves. What the files
        cannot hold (see `check_savable`) is refused before any is written.
        """
        safetensors = require("safetensors.torch", "train")
        self.check_savable()
        folder = expanded(folder)
        description = self.description()
        with writing(folder), Staged() as staged:
            (folder / "peers").mkdir(parents=True, exist_ok=True)
            for k, name in enumerate(self.names):
                # A copy per tensor: safetensors wants them contiguous and refuses shared storage.
                weights = {
                    key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                    for key, value in self.peers[k].state_dict().items()
                }
                data = safetensors.save(weights)
                staged.write(folder / _peer_file(k, name), data)
                description["peers"][k]["sha256"] = hashlib.sha256(data).hexdigest()
            staged.write(folder / "cohort.json", json.dumps(description, indent=2).encode())

    def description(self) -> dict[str, Any]:
        """What cohort.json says, in plain values, without the digests of files."""
        models = zip(self.names, self.models, strict=True)
        return {
            "format": FORMAT,
            "num_classes": self.num_classes,
            "in_channels": int(self.in_channels),
            "head": self.head and dataclasses.asdict(self.head),
            "image_size": self.image_size,
            **self.record(),
            "peers": [{"name": name, "model": model, "sha256": ""} for name, model in models],
        }

    def check_savable(self) -> None:
        """Refuses peers whose state is more than tensors that are all here: safetensors holds
        nothing else, such as what a `get_extra_state` returns."""
        safetensors = require("safetensors.torch", "train")
        for name, peer in zip(self.names, self.peers, strict=True):
            for key, value in peer.state_dict().items():
                if not isinstance(value, Tensor):
                    raise InputError(
                        f"{key} of peer {name} is a {type(value).__name__}, and the files of a "
                        "cohort hold tensors: let get_extra_state return one, or save with "
                        "torch.save(cohort.state_dict(), path)"
                    )
                if (why := absence(value)) is not None:
                    raise InputError(f"{key} of peer {name} is {why}")
                try:
                    safetensors.save({key: value.new_empty(0, device="cpu")})
                except Exception:  # of several kinds, and of tensor subclasses' own
                    kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
                    raise InputError(
                        f"{key} of peer {name} is a tensor ({kind}) that safetensors cannot hold: "
                        "save with torch.save(cohort.state_dict(), path)"
                    ) from None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: str | torch.device = "cpu",
        *,
        peers: Sequence[str | nn.Module] | None = None,
    ) -> Cohort:
        """The cohort that `save` wrote, on `device` and in evaluation mode.

        peers: what to load into, in order. Needed where a peer was a module, or came from
        package.module:function: a file must not decide which code is imported.
        """
        folder = expanded(folder)
        description = _read_description(folder / "cohort.json")
        return cls._rebuilt(description, folder, partial(_read_peer, folder), device, peers)

    @classmethod
    def restore(
        cls,
        description: dict[str, Any],
        weights: dict[str, Tensor],
        path: Path,
        device: str | torch.device = "cpu",
        *,
        peers: Sequence[str | nn.Module] | None = None,
    ) -> Cohort:
        """As `load`, from what a cohort's `description` and `state_dict` were. path: of the file
        that held them."""
        description = _checked_description(lambda: dict(description), path)

        def read(k: int, entry: dict[str, str]) -> tuple[dict[str, Tensor], Path]:
            own = f"peers.{k}."
            return {n.removeprefix(own): w for n, w in weights.items() if n.startswith(own)}, path

        return cls._rebuilt(description, path, read, device, peers)

    @classmethod
    def _rebuilt(
        cls,
        description: dict[str, Any],
        place: Path,
        read: Callable[[int, dict[str, str]], tuple[dict[str, Tensor], Path]],
        device: str | torch.device,
        peers: Sequence[str | nn.Module] | None,
    ) -> Cohort:
        """read: the tensors of a peer, and the file they are from."""
        entries = description["peers"]
        head = description["head"]
        sources = [entry["model"] for entry in entries] if peers is None else _listed(peers)
        if len(sources) != len(entries):
            raise InputError(f"{place} holds {len(entries)} peers, and peers= has {len(sources)}")

        modules = []
        for k, (entry, source) in enumerate(zip(entries, sources, strict=True)):
            name = entry["name"]
            if peers is None and (source is None or is_own(source)):
                raise InputError(
                    f"peer {name} of {place} is your own code ({source or 'a module'}): say what "
                    "to load into, a name or a module for each (peers= of Cohort.load, names only: "
                    "--peers of the command)"
                )
            if isinstance(source, str):
                source = _build(
                    source,
                    description["num_classes"],
                    description["in_channels"],
                    seed=0,
                    k=k,
                    head=head,
                    pretrained=False,
                    image_size=description["image_size"],
                )
            tensors, path = read(k, entry)
            absent = any(t.is_meta for t in chain(source.parameters(), source.buffers()))
            if absent:  # it takes the loaded ones for its own
                tensors = {key: t.clone() for key, t in tensors.items()}
            try:
                source.load_state_dict(tensors, assign=absent)
            except RuntimeError as error:  # names every missing, surplus or misshapen tensor
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"{path} does not fit peer {name}: {reason}") from None
            for key, t in chain(source.named_parameters(), source.named_buffers()):
                if (why := absence(t)) is not None:  # a buffer that no file has
                    raise InputError(f"{key} of peer {name} is {why}")
            modules.append(source)

        same = {key: description[key] for key in ("in_channels", "head", "image_size")}
        cohort = cls(modules, description["num_classes"], **same)
        cohort.names = [entry["name"] for entry in entries]
        cohort.models = [entry["model"] for entry in entries]
        for name in RECORD:
            setattr(cohort, name, description[name])
        return cohort.to(device).eval()

    def export(
        self, folder: str | os.PathLike, example: Tensor | None = None, format: str = "onnx"
    ) -> list[Path]:
        """Writes each peer, in evaluation mode, as NN-name.onnx or (format="torch") NN-name.pt2.

        Input "images": (N, in_channels, H, W), normalised; N, in ONNX called "batch", stays free.
        Output: "logits" (N, C), or of a peer with a re-identification head "features" (N, D), as
        `embed` gives them; its logits are those of the identities that it was trained on.
        example: images of the size to export for; by default that of `image_shape`.
        What is known of `image_shape`, `mean`, `std` and `classes` goes into the file as JSON: in
        ONNX as metadata of these names, else as the extra file images.json. Needs memory for two
        copies of one peer.
        """
        if format not in ("onnx", "torch"):
            raise InputError(f"format must be 'onnx' or 'torch', not {format!r}")
        if format == "onnx":
            require("onnx", "onnx")
            require("onnxscript", "onnx")
        images = self._example(example)
        record = {name: value for name, value in self.record().items() if value is not None}
        write = _onnx if format == "onnx" else _torch_program
        paths = []
        for k, (name, peer) in enumerate(zip(self.names, self.peers, strict=True)):
            peer = copy.deepcopy(peer).to("cpu", memory_format=torch.contiguous_format).eval()
            output = "logits"
            if _has_head(peer):
                peer, output = _Embedding(peer).eval(), "features"
            try:
                data = write(peer, images, output, record)
            except Exception as error:  # anything that a peer's code may raise, and the compiler
                raise InputError(
                    f"peer {name} cannot be exported for images (N, "
                    f"{', '.join(map(str, images.shape[1:]))}): {one_line(error)}"
                ) from error
            suffix = ".onnx" if format == "onnx" else ".pt2"
            path = expanded(folder) / (Path(_peer_file(k, name)).stem + suffix)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
            paths.append(path)
        return paths

    def _example(self, example: Tensor | None) -> Tensor:
        """Two images on the CPU: a batch of one row would be taken as fixed."""
        if example is None:
            shape = self.record()["image_shape"]
            if shape is None:
                raise InputError(
                    "nothing says what images these peers take: give example=, a tensor "
                    f"(N, {self.in_channels}, H, W)"
                )
            return torch.zeros(2, *shape)
        found = tuple(example.shape) if isinstance(example, Tensor) else (type(example).__name__,)
        own = not any(self.models)  # modules take as many channels as they like
        if len(found) != 4 or not found[0] or not (own or found[1] == self.in_channels):
            raise InputError(f"example must be images (N, {self.in_channels}, H, W), not {found}")
        return example.detach().cpu()[:1].repeat(2, 1, 1, 1)

    def _common_class_count(self, peers: Sequence[str | nn.Module], num_classes: int | None) -> int:
        counts = {}
        for name, peer in zip(self.names, peers, strict=True):
            if isinstance(peer, str):
                continue
            count = getattr(peer, "num_classes", None)
            if not isinstance(count, int) and num_classes is None:
                # The last linear layer, as registered, is the head of nearly every classifier;
                # `forward` checks the shape and says so if it was not.
                linear = [m for m in peer.modules() if isinstance(m, nn.Linear)]
                count = linear[-1].out_features if linear else None
            if isinstance(count, int):
                counts[name] = count
        found = {*counts.values()} | ({num_classes} - {None})
        if not found:
            raise InputError("num_classes is needed: nothing in the peers says how many there are")
        if len(found) > 1:
            each = ", ".join(f"{name} has {count}" for name, count in counts.items())
            asked = "" if num_classes is None else f"num_classes is {num_classes}, "
            raise InputError(
                f"all peers must have the same number of classes: {asked}{each}; "
                "build them with one num_classes"
            )
        return found.pop()

    def _check_peers_differ(self) -> None:
        remedy = "give names, as in Cohort(['resnet32', 'resnet32'], 100), or build each afresh"
        for (a, first), (b, second) in combinations(enumerate(self.peers), 2):
            if first is second:
                raise InputError(f"peers {a} and {b} are the same module; {remedy}")
            ours, theirs = [*first.parameters()], [*second.parameters()]
            if any(map(lacks_values, chain(ours, theirs))):
                continue  # they get their values later
            shared = {id(p) for p in ours} & {id(p) for p in theirs}
            if shared:
                raise InputError(f"peers {a} and {b} share {len(shared)} parameters; {remedy}")
            if [p.shape for p in ours] != [p.shape for p in theirs]:
                continue
            pairs = zip(ours, theirs, strict=True)
            if ours and all(torch.equal(p, q.to(p.device)) for p, q in pairs):
                raise InputError(
                    f"peers {a} and {b} start with identical parameters (a deepcopy?) and would "
                    f"never differ; {remedy}"
                )


def check_logits(
    name: str, out: object, x: object, num_classes: int, remedy: str, when: str = ""
) -> None:
    """Refuses what is not one tensor (N, C); by shapes only, known without waiting for the device.

    x: the images, whose number is compared where it is known. remedy: where `out` holds more than
    the logits; `{it}` in it becomes the expression that picks them. when: such as " in training".
    """
    n = x.shape[0] if isinstance(x, Tensor) else None
    if isinstance(out, Tensor) and out.shape[1:] == (num_classes,) and n in (None, len(out)):
        return
    got, it = type(out).__name__, "its logits"
    if isinstance(out, Tensor):
        got, remedy = tuple(out.shape), "num_classes of the cohort and of the peer must be one"
    elif hasattr(out, "logits"):
        it = "out.logits"
    elif isinstance(out, Mapping):
        it = f"out[{next(iter(out), None)!r}]"
        got += f" of {', '.join(map(str, out))}"
    elif isinstance(out, Sequence):
        it = "out[0]"
    raise InputError(
        f"peer {name} must return logits (N, {num_classes}), and for "
        f"{'a batch' if n is None else f'{n} images'}{when} returned {got}: {remedy.format(it=it)}"
    )


def _build(
    name: str,
    num_classes: int,
    in_channels: int,
    seed: int,
    k: int,
    head: ReidHead | None,
    pretrained: bool,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """The model `name` with the weights that belong to (seed, k), on the CPU."""
    state = int(np.random.SeedSequence((seed, k)).generate_state(1)[0])
    # Only the CPU generator is seeded, and restored: torch.manual_seed would also reset CUDA's.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(state)
        return create_model(
            name,
            num_classes,
            in_channels=in_channels,
            head=head,
            pretrained=pretrained,
            image_size=image_size,
        )


def _height_and_width(size: Sequence[int]) -> tuple[int, int]:
    size = tuple(size)
    if len(size) != 2:
        raise InputError(f"image_size must be (height, width), not {size}")
    for number in size:
        check_count("image_size", number)
    return size


class _Embedding(nn.Module):
    """What is exported of a peer with a re-identification head."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, images: Tensor) -> Tensor:
        return self.peer.embed(images)


def _has_head(peer: nn.Module) -> bool:
    """Both methods: networks of all kinds have an `embed` that means something else."""
    return all(callable(getattr(peer, name, None)) for name in ("embed", "logits_and_features"))


def _onnx(peer: nn.Module, images: Tensor, output: str, record: dict[str, list]) -> bytes:
    program = torch.onnx.export(
        peer, (images,), input_names=["images"], output_names=[output],
        dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False,
    )  # fmt: skip
    model = program.model_proto
    for name, value in record.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    return model.SerializeToString()


def _torch_program(peer: nn.Module, images: Tensor, output: str, record: dict[str, list]) -> bytes:
    batch = torch.export.Dim("batch")
    program = torch.export.export(peer, (images,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(
        program, buffer, extra_files={"images.json": json.dumps({"output": output, **record})}
    )
    return buffer.getvalue()


def _unique(names: Sequence[str]) -> list[str]:
    """Repeated names get -1, -2, ...; the others stay."""
    total, seen, unique = Counter(names), Counter(), []
    for name in names:
        seen[name] += 1
        unique.append(f"{name}-{seen[name]}" if total[name] > 1 else name)
    return unique


def _listed(peers: Sequence[str | nn.Module]) -> list[str | nn.Module]:
    if isinstance(peers, (str, nn.Module)) or not isinstance(peers, Iterable):
        one = type(peers).__name__ if isinstance(peers, nn.Module) else repr(peers)
        raise InputError(f"peers must be a list, such as ['resnet32', 'resnet32'], not {one}")
    peers = list(peers)
    for k, peer in enumerate(peers):
        if not isinstance(peer, (str, nn.Module)):
            raise InputError(
                f"peer {k} is a {type(peer).__name__}, neither a model name nor a torch module"
            )
    return peers


def _peer_file(k: int, name: str) -> str:
    """The number keeps files apart whose names differ only in what a file name cannot hold."""
    return f"peers/{k:02d}-{safe_name(name, LONGEST_NAME)}.safetensors"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _read_peer(folder: Path, k: int, entry: dict[str, str]) -> tuple[dict[str, Tensor], Path]:
    """The weights of a peer and their file, which is the one that cohort.json means."""
    path = folder / _peer_file(k, entry["name"])
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InputError(
            f"{path} is not the file that cohort.json was written with (truncated, changed, or "
            "from an interrupted save): save the cohort again"
        )
    safetensors = require("safetensors.torch", "train")
    try:
        return safetensors.load(data), path
    except Exception as error:  # a header that somebody wrote can make it raise nearly anything
        reason = one_line(error)
        raise InputError(f"{path} holds no safetensors that can be read: {reason}") from None


def read_record(folder: str | os.PathLike) -> dict[str, list | None]:
    """`Cohort.record` of what `save` wrote, without the weights."""
    description = _read_description(expanded(folder) / "cohort.json")
    return {name: description[name] for name in RECORD}


def _read_description(path: Path) -> dict:
    return _checked_description(lambda: json.loads(_read(path)), path)


def _checked_description(read: Callable[[], dict], path: Path) -> dict:
    """What `read` gives of a file, checked; its head as a ReidHead, None where there is none."""
    try:
        description = read()
        version = description["format"]
        peers = [(e["name"], e["model"], e["sha256"]) for e in description["peers"]]
        sizes = (description["num_classes"], description["in_channels"])
        head = description.get("head")  # not in the files of earlier versions, as the record
        description["head"] = None if head is None else ReidHead(**head)
        size = description.get("image_size")  # nor this
        description["image_size"] = None if size is None else _height_and_width(size)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        text = not isinstance(error, UnicodeDecodeError)  # which holds the whole file
        reason = repr(error) if text else "not a text file"
        raise InputError(f"{path} does not describe a cohort: {reason}") from None
    if version != FORMAT:
        raise InputError(f"{path} has format {version!r}; this version of fastdml reads {FORMAT}")
    texts = [t for n, m, sha256 in peers for t in (n, "" if m is None else m, sha256)]
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int) for n in sizes):
        raise InputError(f"{path} does not describe a cohort: a name or a number is of wrong type")
    try:
        record = {name: description.get(name) for name in RECORD}
        return description | _checked_record(record, description["num_classes"])
    except InputError as error:
        raise InputError(f"{path} does not describe a cohort: {error}") from None


def _checked_record(values: dict[str, Any], num_classes: int) -> dict[str, list | None]:
    """The values of `RECORD` as lists, None where unknown."""
    channels = None
    if (shape := values["image_shape"]) is not None:
        shape = _plain(shape)
        if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(f"image_shape must be (channels, height, width), not {shape!r}")
        channels = shape[0]
    found: dict[str, list | None] = {"image_shape": shape}
    for name in ("mean", "std"):
        if (numbers := values[name]) is not None:
            numbers = _plain(numbers)
            low = 0 if name == "std" else -math.inf
            if len(numbers) != (channels or len(numbers) or 1) or not all(
                type(n) in (int, float) and low < n < math.inf for n in numbers
            ):
                count = f" for {channels} channels" if channels else ""
                above = " above 0" if name == "std" else ""
                raise InputError(
                    f"{name} must be one finite number{above} a channel{count}, not {numbers!r}"
                )
        found[name] = numbers
    if (classes := values["classes"]) is not None:
        classes = _plain(classes)
        if len(classes) != num_classes or not all(isinstance(c, str) for c in classes):
            raise InputError(
                f"classes must be {num_classes} names, one for each logit, not {str(classes)[:60]}"
            )
    found["classes"] = classes
    return found


def _plain(values: Any) -> list:
    """A sequence, array or tensor as a list of Python's own values; anything else as a list of it,
    which fits nowhere."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values]
    return list(values)
