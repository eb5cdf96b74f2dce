"""The parts of a sharded peer on disk, by torch.distributed.checkpoint.

A peer's state is divided into what is whole, in which a marker stands for each shard, and the parts
of shards that are on this rank. All ranks of the row write their parts into one folder, which any
number of ranks reads again, each what it needs. torch's format has no checksum and its index is a
pickle: a folder is written once, and read only after its files were compared with digests.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastdml.absent_tensors import is_sharded, local_part
from fastdml.errors import InputError, one_line

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MARKER = "shard"  # the only key of what stands for one
State = dict[str, Any]


def divided(state: State) -> tuple[State, State]:
    """Nested dicts, in which some tensors are shards, without them, and the parts of these that are
    here, by the names that the markers have. Nothing is copied."""
    parts: State = {}

    def without(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: without(v, (*path, str(key))) for key, v in value.items()}
        if isinstance(value, Tensor) and is_sharded(value):
            name = "/".join(path)
            parts[name] = _described(value)
            return {MARKER: name}
        return value

    return without(state, ()), parts


def _described(t: Tensor) -> State:
    """A shard in plain values, from which one over other processes or devices can be made."""
    shard = cast("DTensor", t)
    return {
        "part": local_part(t),
        "shape": tuple(shard.shape),
        "stride": tuple(shard.stride()),
        "dim": cast("Any", shard.placements[0]).dim,
    }


def write(folder: Path, parts: Mapping[str, State], group: dist.ProcessGroup) -> None:
    """Writes parts on the host into a folder that no other save uses. All ranks of the row call it,
    `group`: of them, by gloo. Raises InputError on all where one cannot write."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save
    from torch.distributed.tensor import DTensor, Shard

    over = DeviceMesh.from_group(group, "cpu")
    shards = {
        name: DTensor.from_local(
            of["part"],
            over,
            [Shard(of["dim"])],
            run_check=False,
            shape=torch.Size(of["shape"]),
            stride=tuple(of["stride"]),
        )
        for name, of in parts.items()
    }
    try:
        save(shards, storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        reasons = [one_line(e) for e, _ in error.failures.values()]
        raise InputError(f"cannot write the checkpoint {folder}: {reasons[0]}") from None


def joined(state: State, folder: Path | None, module: nn.Module | None) -> State:
    """What `divided` and `write` got. Where a weight of `module` is a shard, tensors that belong to
    it, by their names, are such shards, whether the state has markers or whole tensors; else all
    are whole. folder: None for a state without markers. No communication; each rank reads what it
    needs. Raises InputError for another module's."""
    weights = {} if module is None else dict(module.named_parameters())
    wanted: dict[str, Tensor] = {}
    known = {} if folder is None else _sizes(folder)

    def placed(value: Any, path: tuple[str, ...]) -> Any:
        weight = next((weights[name] for name in reversed(path) if name in weights), None)
        if isinstance(value, dict):
            if value.keys() == {MARKER}:
                name = value[MARKER]
                if name not in known:
                    raise InputError(f"{folder} has nothing of {name}")
                wanted[name] = _room(*known[name], weight)
                return wanted[name]
            return {key: placed(v, (*path, str(key))) for key, v in value.items()}
        if isinstance(value, Tensor) and weight is not None and value.shape == weight.shape:
            return _like(weight, value)
        return value

    found = placed(state, ())
    if folder is not None:
        _read(folder, wanted)
    return found


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint import FileSystemReader

    entries: Any = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _room(size: torch.Size, dtype: torch.dtype, weight: Tensor | None) -> Tensor:
    """For a tensor to be read into: a shard where the weight that it belongs to is one."""
    if weight is not None and is_sharded(weight):
        if weight.shape != size:
            raise InputError(f"a weight has the shape {tuple(weight.shape)} and had {tuple(size)}")
        return torch.zeros_like(weight, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, of which all ranks have the whole, as a shard where the weight is one."""
    if not is_sharded(weight) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    shard = cast("DTensor", weight)
    value = value.to(shard.device)
    return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)


def _read(folder: Path, wanted: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load")
            load(dict(wanted), storage_reader=FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:
        reasons = [one_line(e) for e, _ in error.failures.values()]
        raise InputError(f"cannot read the checkpoint {folder}: {reasons[0]}") from None
