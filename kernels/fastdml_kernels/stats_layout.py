"""Where each statistic stands in the one vector that holds them all: nobody else counts positions.

The kernels write this "packed" vector, the launchers allocate it, and whoever holds it reads a
statistic through its layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
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

    def span(self, first: str, last: str) -> slice:
        """The positions of `first`, `last` and everything between."""
        names = self._fields
        return slice(getattr(self, first), self[names.index(last) + 1])

    def view(self, packed: Tensor, name: str) -> Tensor:
        """One statistic of a packed vector (size,), in its shape: (K,), () or (K, K)."""
        K = self.kl - self.ce
        found = packed[self.span(name, name)]
        return found.view(stats_shapes(K)[name])

    def pack(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The packed vector (size,) of all statistics by name, its padding zero."""
        parts = [statistics[name].reshape(-1) for name in self._fields[:-2]]
        return torch.cat([*parts, parts[0].new_zeros(self.size - self.used)])


@cache
def stats_layout(K: int) -> StatsLayout:
    """The layout of K peers' statistics."""
    *starts, used = accumulate(map(prod, stats_shapes(K).values()), initial=0)
    return StatsLayout(*starts, used, size=1 << (used - 1).bit_length())
