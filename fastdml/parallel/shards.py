"""Peers too large for one device: FSDP2 (`fully_shard`) over the ranks of a mesh's row.

Each rank keeps a part of every weight, its gradient, its average and the optimizer's state. A block
of the network is whole only while it computes: its weights are gathered before each pass and freed
after it, so that a rank must hold the largest block, not the peer.

Gradients are summed over the columns, as those of replicas are, since the loss is a mean over the
whole batch already; torch's own default divides by the number of ranks.

Tested on CPUs with gloo, against replicas and one process; on CUDA it has not run.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastdml import absent_tensors
from fastdml.absent_tensors import absence
from fastdml.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from fastdml.cohort import Cohort
    from fastdml.parallel.mesh import Mesh

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Methods beside forward that run a peer, in which its weights must be gathered as well.
ALSO_FORWARD = ("logits_and_features", "embed")


def shard(cohort: Cohort, mesh: Mesh) -> None:
    """Shards every local peer over its row of the mesh, in place; all ranks call it.

    Each block (see `blocks`) is a unit that is gathered by itself, and what is in none is one more.
    A peer that the caller has sharded by `fully_shard` on `mesh.device_mesh["data"]` keeps his
    units. Weights become contiguous and move to the mesh's device, a unit at a time, so that a peer
    may be built on the host. Make optimizer, `Ema` and step afterwards: those made before hold
    weights that no longer train. Peers cannot be copied or moved from then on. A row of one rank
    has nothing to shard.

    Raises InputError, on every rank of the row, for peers that are built otherwise in other
    columns, have weights without dimensions, or are sharded in part or over other ranks.
    """
    if mesh.data == 1:
        return
    _check_same(cohort, mesh)
    for k in mesh.local:
        name, peer = cohort.names[k], cohort.peers[k]
        for unit in units(peer):
            unit.reshard()
        group = cast("dist.ProcessGroup", mesh.data_group_of(k))
        if not is_sharded(peer):
            _check_shardable(name, peer)
            _shard(peer, DeviceMesh.from_group(group, mesh.device.type, mesh_dim_names=("data",)))
        _check_sharded(name, peer, group)
        _settle(peer)


def is_sharded(peer: nn.Module) -> bool:
    """Whether any of its weights is sharded."""
    return any(map(absent_tensors.is_sharded, peer.parameters()))


def units(peer: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose weights are gathered together."""
    from torch.distributed.fsdp import FSDPModule  # 0.5 s, which only those who shard pay

    for module in peer.modules():
        if isinstance(module, FSDPModule):
            yield module


def sum_gradients(peer: nn.Module, now: bool) -> None:
    """Whether the backward passes that follow add up the columns' gradients. Where a batch is
    computed in parts, all but the last leave it; a rank then holds the peer's whole gradient."""
    root: Any = peer
    root.set_requires_gradient_sync(now)


def blocks(peer: nn.Module) -> list[nn.Module]:
    """The units that `shard` makes beside the peer itself: the innermost modules with children of
    their own that are entries of a Sequential, ModuleList or ModuleDict, such as the residual
    blocks of torchvision's ResNet and the layers of timm's and Hugging Face's transformers. None
    where weights are shared between modules, since units cannot share them."""
    named = [id(w) for _, w in peer.named_parameters(remove_duplicate=False)]
    if len({*named}) < len(named):
        return []
    entries = [
        child
        for module in peer.modules()
        if isinstance(module, CONTAINERS)
        for child in module.children()
        if not isinstance(child, CONTAINERS) and next(child.children(), None) is not None
    ]
    ids = {id(entry) for entry in entries}
    inner = [e for e in entries if not any(id(m) in ids for m in e.modules() if m is not e)]
    return [block for block in inner if next(block.parameters(), None) is not None]


def _shard(peer: nn.Module, over: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for w in peer.parameters():
            w.data = w.data.contiguous()  # in channels_last FSDP2 refuses them
    for block in blocks(peer):
        fully_shard(block, mesh=over)
    fully_shard(peer, mesh=over)


def _settle(peer: nn.Module) -> None:
    """Sums in place of means; weights whole only within a pass; buffers to gather into, which would
    be useless to training if an evaluation under `inference_mode` made them."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for unit in units(peer):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.unshard()
        unit.reshard()
    root: Any = peer
    root.set_reshard_after_forward(True)
    for method in ALSO_FORWARD:
        if hasattr(peer, method):
            register_fsdp_forward_method(peer, method)


# ---- checks


def _check_shardable(name: str, peer: nn.Module) -> None:
    for key, w in peer.named_parameters():
        if (why := absence(w)) is not None:
            raise InputError(f"{key} of peer {name} is {why}")
        if w.dim() == 0:
            raise InputError(
                f"{key} of peer {name} has no dimension to shard along: give it the shape (1,), or "
                "train without fsdp"
            )


def _check_sharded(name: str, peer: nn.Module, group: dist.ProcessGroup) -> None:
    """Refuses a peer that its owner sharded in part, along something else, or over other ranks."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    ranks = dist.get_process_group_ranks(group)
    remedy = 'call fully_shard on the peer itself too, with mesh=mesh.device_mesh["data"]'
    if not isinstance(peer, FSDPModule):
        raise InputError(f"peer {name} is sharded in part: {remedy}")
    for key, w in peer.named_parameters():
        if not isinstance(w, DTensor):
            raise InputError(f"{key} of peer {name} is whole where others are sharded: {remedy}")
        over = w.device_mesh
        if over.ndim != 1 or not isinstance(w.placements[0], Shard):
            raise InputError(f"{key} of peer {name} is sharded along {over}: {remedy}")
        if dist.get_process_group_ranks(over.get_group()) != ranks:
            raise InputError(f"{key} of peer {name} is sharded over other ranks: {remedy}")


def _check_same(cohort: Cohort, mesh: Mesh) -> None:
    """Refuses peers whose weights differ between columns: each rank keeps a part of its own."""
    first: dict[int, tuple[int, int]] = {}  # rank and mark
    marks = mesh.gather([[k, _mark(cohort.peers[k])] for k in mesh.local])
    for rank, found in enumerate(marks):
        for k, mark in found:
            other, known = first.setdefault(k, (rank, mark))
            if mark != known:
                raise InputError(
                    f"peer {cohort.names[k]} has other weights on rank {rank} than on rank "
                    f"{other}: build the cohort on every rank from one seed"
                )


def _mark(peer: nn.Module) -> int:
    """Of the values of all whole weights; 0 where its owner has sharded the peer."""
    if is_sharded(peer):
        return 0
    sums = [_bytes(w) for w in peer.parameters() if not w.is_meta]
    return zlib.crc32(repr(sums).encode())


def _bytes(w: Tensor) -> int:
    values = w.detach().contiguous().reshape(-1).view(torch.uint8)
    return int(values.sum(dtype=torch.int64))


# ---- whole weights


def whole_weights(peer: nn.Module) -> dict[str, Tensor] | None:
    """`peer.state_dict()` with whole tensors on the host, on column 0; None on the others. All
    ranks of its row call it. One weight at a time is whole on the device."""
    weights: dict[str, Tensor] = {}
    first = True
    for name, value in peer.state_dict().items():
        if absent_tensors.is_sharded(value):
            shard = cast("DTensor", value)
            first = shard.device_mesh.get_local_rank() == 0
            value = shard.full_tensor()
        if first:
            weights[name] = value.detach().to("cpu", copy=True)
    return weights if first else None


@torch.no_grad()
def take(part: Tensor, whole: Tensor) -> None:
    """Copies `whole` into `part`, of which a shard takes its own values. No communication."""
    if absent_tensors.is_sharded(part):
        from torch.distributed.tensor import distribute_tensor

        shard = cast("DTensor", part)
        if tuple(whole.shape) != tuple(part.shape):
            raise InputError(f"{tuple(part.shape)} is needed, and {tuple(whole.shape)} was found")
        whole = whole.to(part.device, part.dtype)
        own = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        shard.to_local().copy_(own.to_local())
    else:
        part.copy_(whole)


def load_weights(peer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Puts whole weights, which each column has read, into a sharded peer."""
    own = peer.state_dict()
    found = dict(weights)
    missing, surplus = [*own.keys() - found.keys()], [*found.keys() - own.keys()]
    if missing or surplus:
        raise InputError(
            f"the weights are of another peer: missing {sorted(missing)}, surplus {sorted(surplus)}"
        )
    for name, value in own.items():
        take(value, found[name])
