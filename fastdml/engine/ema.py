"""Exponential moving average of the peers' weights and of normalisation layers' running statistics.

All other buffers (masks, positional tables, spectral norm's vectors, counts of batches) are not
averaged: an infinite entry would become NaN, and the average of unit vectors is not a unit vector.
A frozen weight is copied.

`update` costs one multi-tensor launch and reads and writes the average once. The averages begin at
the weights that the peers have when the average is made, or when a layer is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdml.absent_tensors import is_sharded, local_part
from fastdml.engine.weights import Parts
from fastdml.errors import InputError
from fastdml.torch_private import foreach_copy_, foreach_lerp_

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

STATISTICS = "running_"  # the names of such buffers begin so in torch, and in what follows it


class Ema:
    """average = decay * average + (1 - decay) * weight, after every step."""

    def __init__(self, cohort: Cohort, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"the decay of the moving average must be within 0..1, not {decay!r}")
        self.cohort, self.decay = cohort, decay
        self.names: list[str] = []
        self.averages: list[Tensor] = []
        self._collect()

    def refresh(self) -> None:
        """Takes in weights that were replaced or moved. The average of one whose shape has changed
        begins anew at the weight; the others go on."""
        moved = any(
            (average.device, average.dtype) != (t.device, t.dtype)
            for average, t in zip(self.averages[:1], self.live[:1], strict=True)
        )
        if moved or not self.parts.unchanged():
            self._collect()

    @torch.no_grad()
    def _collect(self) -> None:
        before = dict(zip(self.names, self.averages, strict=True))
        self.parts = Parts(self.cohort)
        named: dict[str, Tensor] = dict(self.cohort.named_parameters())
        for name, t in self.cohort.named_buffers():
            if name.rpartition(".")[2].startswith(STATISTICS):
                named[name] = t
        named = {n: t for n, t in named.items() if t.is_floating_point() or t.is_complex()}
        self.names, self.live, self.averages = list(named), list(named.values()), []
        for name, t in named.items():
            average = before.get(name)
            if average is not None and is_sharded(average) != is_sharded(t):
                raise InputError(
                    f"the average of {name} was begun before the weight was sharded: make the "
                    "averages after the peers are sharded"
                )
            if average is None or average.shape != t.shape:
                average = t.detach().clone()
            self.averages.append(average.to(t.device, t.dtype))
        # Weights with infinite entries, such as a bias that masks: inf - inf would make the
        # average NaN, so `update` leaves entries alone that are equal already.
        self.infinite = [bool((~local_part(t).isfinite()).any()) for t in self.live]
        self.sharded = any(map(is_sharded, self.live))

    @torch.no_grad()
    def update(self) -> None:
        self.refresh()
        trained: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        pairs = zip(self._parts(self.averages), self._parts(self.live), strict=True)
        for (average, t), live, infinite in zip(pairs, self.live, self.infinite, strict=True):
            if infinite:
                moved = average.lerp(t, 1 - self.decay)
                average.copy_(torch.where(average == t, t, moved))
                continue
            # Buffers require no gradient, and yet these are averaged: they change with every batch.
            frozen = isinstance(live, torch.nn.Parameter) and not live.requires_grad
            lists = copied if frozen else trained
            lists[0].append(average)
            lists[1].append(t)
        if trained[0]:  # of a mesh's rows one may have frozen peers alone
            foreach_lerp_(*trained, 1 - self.decay)
        if copied[0]:
            foreach_copy_(*copied)

    def _parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of shards the values that are here, each of which has its average here too."""
        return [local_part(t) for t in tensors] if self.sharded else tensors

    @torch.no_grad()
    def copy_to_cohort(self) -> None:
        """The cohort has the averages from now on; its own weights are lost."""
        self.refresh()
        foreach_copy_(self._parts(self.live), self._parts(self.averages))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the cohort has the averages; afterwards its own weights again."""
        self.refresh()
        with torch.no_grad():
            own = [t.detach().clone() for t in self._parts(self.live)]
        self.copy_to_cohort()
        try:
            yield
        finally:
            with torch.no_grad():
                foreach_copy_(self._parts(self.live), own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads the averages. Other entries, which earlier versions saved, are ignored."""
        self.refresh()
        for name, average in zip(self.names, self.averages, strict=True):
            found = tuple(state[name].shape) if name in state else "nothing"
            if found != average.shape:
                raise InputError(
                    f"the averages are of another cohort: {name} needs {tuple(average.shape)}, "
                    f"and the state has {found}"
                )
        with torch.no_grad():
            for name, average in zip(self.names, self.averages, strict=True):
                average.copy_(state[name])
