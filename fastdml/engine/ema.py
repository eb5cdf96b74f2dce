"""Exponential moving average of the peers: weights and BatchNorm statistics.

`update` costs one multi-tensor launch and reads and writes the average once. The averages begin at
the weights that the peers have when the average is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.cohort import Cohort


class Ema:
    """average = decay * average + (1 - decay) * weight, after every step."""

    def __init__(self, cohort: Cohort, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"the decay of the moving average must be within 0..1, not {decay!r}")
        named = [*cohort.named_parameters(), *cohort.named_buffers()]
        named = [(name, t) for name, t in named if t.is_floating_point()]
        self.decay = decay
        self.names = [name for name, _ in named]
        self.live = [t for _, t in named]
        self.averages = [t.detach().clone() for t in self.live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.averages, self.live, 1 - self.decay)

    @torch.no_grad()
    def copy_to_cohort(self) -> None:
        """The cohort has the averages from now on; its own weights are lost."""
        torch._foreach_copy_(self.live, self.averages)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the cohort has the averages; afterwards its own weights again."""
        with torch.no_grad():
            own = [t.detach().clone() for t in self.live]
        self.copy_to_cohort()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.live, own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, average in zip(self.names, self.averages, strict=True):
                average.copy_(state[name])
