"""Optimizers whose weights are shards (DTensors, as FSDP2 makes them).

SGD, Adam and AdamW change every entry by itself, so that their kernels give the same numbers on the
parts that are here as on the whole, without the dispatch of DTensors, and the fused ones, of which
SGD's knows no DTensors, run at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fastdml.absent_tensors import is_sharded, local_part


@contextmanager
def on_local_parts(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the optimizer's groups and state hold the local parts of shards; what a step adds to
    the state becomes shards afterwards."""
    own: Any = optimizer
    groups, state = own.param_groups, own.state
    parts: list[tuple[Tensor, Tensor]] = []  # a weight and its local part
    local: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    own.param_groups, own.state = [], local
    for group in groups:
        mine = []
        for w in group["params"]:
            part = local_part(w) if is_sharded(w) else w
            if part is not w:
                part.grad = None if w.grad is None else local_part(w.grad)
            if w in state:
                local[part] = {name: _local(value) for name, value in state[w].items()}
            parts.append((w, part))
            mine.append(part)
        own.param_groups.append({**group, "params": mine})
    try:
        yield
    finally:
        own.param_groups, own.state = groups, state
        for w, part in parts:
            _keep(state, w, part, local.get(part, {}))


def _local(value: Any) -> Any:
    return local_part(value) if isinstance(value, Tensor) else value


def _keep(state: dict[Any, Any], w: Tensor, part: Tensor, now: dict[str, Any]) -> None:
    """Takes over the entries of a weight's state that a step has made or replaced."""
    was = state[w] if now else {}
    for name, value in now.items():
        before = was.get(name)
        if isinstance(before, Tensor) and _same_memory(local_part(before), value):
            continue
        if part is not w and isinstance(value, Tensor) and value.shape == part.shape:
            value = like(w, value)
        was[name] = value


def _same_memory(first: Tensor, second: object) -> bool:
    return (
        isinstance(second, Tensor)
        and first.data_ptr() == second.data_ptr()
        and first.stride() == second.stride()
    )


def like(w: Tensor, part: Tensor) -> Tensor:
    """A shard as `w` is one, with these values here."""
    from torch.distributed.tensor import DTensor

    whole = cast("DTensor", w)
    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def any_of(flag: Tensor, weights: Sequence[Tensor]) -> None:
    """Makes `flag` (0-d) of each rank that holds a part of these weights the largest of all, in
    place; a peer whose weights are whole here has no other ranks to ask."""
    sharded = next((w for w in weights if is_sharded(w)), None)
    if sharded is not None:
        group = cast("Any", sharded).device_mesh.get_group()
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
