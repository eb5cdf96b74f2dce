"""The position of each statistic in the one vector that holds them all, known here alone.

The kernels write this "packed" vector, the launchers allocate it, and a statistic is read from it
through its layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


def stats_shapes(K: int) -> dict[str, tuple[int, ...]]:
    """The statistics of K peers in their order, each with its shape."""
    return {
        "ce": (K,),  # cross-entropy, mean over the labelled rows
        "kl": (K,),  # KL term before kl_weight, mean over the rows that take part
        "label_weight": (),  # class weights of the labelled rows, summed
        "labelled": (),  # rows with a label
        "entropy": (K,),  # of softmax(z), mean over the rows that take part
        "correct": (K,),  # rows whose largest logit is the label's
        "ensemble_correct": (),  # rows whose largest mean probability is the label's
        "pairwise_kl": (K, K),  # T**2 KL(p_l || p_k) at [teacher l, student k], mean over rows
    }


class StatsLayout(NamedTuple):
    """The position at which each statistic begins. Those of a matrix follow row by row.

    A tuple of numbers, so that a Triton kernel can take it as a compile-time constant and C code
    as an array.
    """

    ce: int
    kl: int
    label_weight: int
    labelled: int
    entropy: int
    correct: int
    ensemble_correct: int
    pairwise_kl: int
    used: int  # numbers in all; positions from here on are padding
    size: int  # length of the vector: a power of two, as Triton's blocks are

    def span(self, first: str, last: str | None = None) -> slice:
        """The positions of one statistic, or from `first` to `last` with everything between."""
        return slice(getattr(self, first), self[self._fields.index(last or first) + 1])

    def view(self, packed: Tensor, name: str) -> Tensor:
        """One statistic of a packed vector (size,), in its shape: (K,), () or (K, K)."""
        values, shape = packed[self.span(name)], stats_shapes(self.kl - self.ce)[name]
        return values if len(shape) == 1 else values.view(shape)

    def views(self, packed: Tensor) -> dict[str, Tensor]:
        """All statistics of a packed vector by name, in their shapes."""
        shapes = stats_shapes(self.kl - self.ce)
        parts = packed[: self.used].split([prod(shape) for shape in shapes.values()])
        return {
            name: part if len(shape) == 1 else part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def pack(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The packed vector (size,) of all statistics by name, its padding zero."""
        parts = [statistics[name].reshape(-1) for name in self._fields[:-2]]
        return torch.cat([*parts, parts[0].new_zeros(self.size - self.used)])


_LAYOUTS: dict[int, StatsLayout] = {}


def stats_layout(K: int) -> StatsLayout:
    """The layout of K peers' statistics."""
    K = int(K)  # a compiler that took it for a variable settles on it here
    if K not in _LAYOUTS:
        starts = list(accumulate(map(prod, stats_shapes(K).values()), initial=0))
        _LAYOUTS[K] = StatsLayout._make([*starts, 1 << (starts[-1] - 1).bit_length()])
    return _LAYOUTS[K]
