"""Verification: the true positive rate at fixed false positive rates, over pairs in blocks.

With Q x G pairs, 958 million on MSMT17, neither all distances nor their order are kept. A threshold
that accepts at most k impostors is the (k + 1)-th smallest distance of impostors, so that the k + 1
smallest are kept, which is exact: with a rate of 1 % that takes 0.15 gigabytes there, where all
distances are four. A block of distances costs a comparison each, and later blocks few copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdml.errors import InputError

PIECE = 1 << 20  # numbers that one selection reads: its working memory is 16 bytes each


class Verification:
    """Counts genuine pairs below thresholds that accept a share `fprs` of all impostor pairs."""

    def __init__(self, fprs: Sequence[float], impostors: int) -> None:
        for fpr in fprs:
            if not 0 <= fpr <= 1:
                raise InputError(f"a false positive rate of {fpr}: give numbers within 0 and 1")
        self.accepted = {fpr: accepted_at(fpr, impostors) for fpr in fprs}
        self.impostors = impostors
        self.genuine: list[Tensor] = []
        self.smallest = Smallest(max(self.accepted.values(), default=0) + 1)

    def add(self, genuine: Tensor, impostors: Tensor) -> None:
        """Distances of genuine pairs (P,), and of impostors in any shape, NaN where a place is
        none. Both must compare between calls."""
        self.genuine.append(genuine.cpu())
        self.smallest.add(impostors)

    def rates(self) -> dict[float, float]:
        """False positive rate -> true positive rate; NaN where there are no impostors."""
        genuine, nearest = torch.cat(self.genuine), self.smallest.sorted()
        found = {}
        for fpr, accepted in self.accepted.items():
            if not self.impostors:
                found[fpr] = math.nan
            elif accepted == self.impostors:
                found[fpr] = 1.0
            else:  # infinite distances are not kept: they are the largest
                limit = nearest[accepted] if accepted < len(nearest) else math.inf
                found[fpr] = (genuine < limit).double().mean().item()
        return found


def accepted_at(fpr: float, impostors: int) -> int:
    """The most of so many impostors that may be accepted: the largest k with k / impostors at most
    `fpr`."""
    k = min(int(fpr * impostors) + 1, impostors)
    while k and k / impostors > fpr:
        k -= 1
    return k


class Smallest:
    """The `count` smallest of the finite numbers that are added, exactly."""

    def __init__(self, count: int) -> None:
        self.count, self.held = count, 0
        self.bound = math.inf  # where `count` numbers are at most this, no other matters
        self.parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        for piece in values.flatten().split(PIECE):
            below = piece[piece < self.bound]  # NaN compares false
            self.parts.append(below)
            self.held += len(below)
            if self.held >= 2 * self.count + PIECE:
                self._drop()

    def _drop(self) -> None:
        values = torch.cat(self.parts)
        if len(values) > self.count and values.is_cuda:
            values = values.topk(self.count, largest=False, sorted=False).values
        elif len(values) > self.count:  # in place; topk would take eight times the memory
            values.numpy().partition(self.count - 1)
            values = values[: self.count].clone()
        if len(values) == self.count:
            self.bound = values.max().item()
        self.parts, self.held = [values], len(values)

    def sorted(self) -> Tensor:
        """(count,), or fewer where fewer were added, on the host."""
        self._drop()
        return self.parts[0].sort().values.cpu()
