"""Weights of a peer, or of an ensemble, as one .safetensors file that says what they are.

The header's metadata hold, under "fastdml", what cohort.json says of the peers within, whether
they are an ensemble, and what a call gives. Of one peer the tensors have the names of its state
dict; of an ensemble those of `peer_outputs.Ensemble`, peers.K.NAME.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdml.cohort_files import describe, read_file
from fastdml.errors import InputError, one_line, require

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

KEY = "fastdml"  # in the header's metadata


def to_safetensors(cohort: Cohort, chosen: Sequence[int], ensemble: bool, output: str) -> bytes:
    """The file of the `chosen` peers. output: what a call of them gives, for readers."""
    safetensors = require("safetensors.torch", "train")
    weights = {
        f"peers.{place}.{key}" if ensemble else key: value.detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )
        for place, k in enumerate(chosen)
        for key, value in cohort.peers[k].state_dict().items()
    }
    digest = _digest(safetensors.save(weights))
    described = describe(cohort)
    entries = [described["peers"][k] | {"sha256": digest} for k in chosen]
    facts = {**described, "peers": entries, "ensemble": ensemble, "output": output}
    return safetensors.save(weights, {"format": "pt", KEY: json.dumps(facts)})


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an exported file says of its peers, and the weights as a cohort of them names them,
    peers.K.NAME. Raises InputError for a file that is damaged or that nobody exported."""
    safetensors = require("safetensors.torch", "train")
    data = read_file(path)
    try:
        weights = safetensors.load(data)
        facts = _metadata(data).get(KEY)
    except Exception as error:  # a damaged or forged header can raise nearly anything
        reason = one_line(error)
        raise InputError(f"{path} holds no safetensors that can be read: {reason}") from None
    if facts is None:
        raise InputError(
            f"{path} does not say which peer its weights are of: give a file that fastdml export "
            "wrote, or the folder that the weights lie in"
        )
    try:
        description = json.loads(facts)
        ensemble = bool(description["ensemble"])
        digests = {entry["sha256"] for entry in description["peers"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} does not describe its peers: {error!r}") from None
    if digests != {_digest(data)}:
        raise InputError(f"{path} is damaged: its weights are not those that were exported")
    if not ensemble:
        weights = {f"peers.0.{key}": value for key, value in weights.items()}
    return description, weights


def _metadata(data: bytes) -> Mapping[str, str]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _digest(data: bytes) -> str:
    """SHA-256 of the tensors' bytes, which follow the header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[start:]).hexdigest()


def module_name(k: int, name: str) -> str:
    """Of the file of Python, beside the weights of peer k, that makes its network."""
    return f"model_{k:02d}_{re.sub('[^A-Za-z0-9]', '_', name)[:100]}"
