"""Tensors whose values this process does not hold, or only in part: on the meta device, of lazy
modules, shards."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy


def lacks_values(t: Tensor) -> bool:
    """Whether `t` is on the meta device, or belongs to a lazy module that has seen no batch yet."""
    return is_lazy(t) or t.is_meta


def is_sharded(t: Tensor) -> bool:
    """Whether `t` is a DTensor. Does not import their module (0.7 s): where nobody has, there are
    none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local_part(t: Tensor) -> Tensor:
    """Of a shard the values that are here, sharing its memory; every other tensor itself."""
    if not is_sharded(t):
        return t
    shard: Any = t.detach()
    return shard.to_local()


def absence(t: Tensor, *, shards: bool = False) -> str | None:
    """Why `t` has no values or only some, and the remedy, in words; None where it has all. shards:
    those may have some."""
    if is_lazy(t):
        return (
            "of a lazy layer, and has no shape yet: run a batch through the cohort first, as in "
            "cohort(images)"
        )
    if t.is_meta:
        return (
            "on the meta device, and has no values: give it some first, as with "
            "cohort.to_empty(device='cpu') and load_state_dict"
        )
    if is_sharded(t) and not shards:
        return (
            "sharded (a DTensor, as fully_shard of FSDP2 makes them), and only a part of it is "
            "here: keep each peer whole, train it on a mesh, as with make_step(mesh=...), or "
            "gather it into a plain one, as with fastdml.parallel.whole_weights"
        )
    return None
