"""execution="auto" on a CUDA device: measures at the first step and keeps the fastest.

Each candidate runs a few steps on the first batch, is timed over a few more, and the state is
restored bit for bit. Candidates that cannot run here (peers of several architectures cannot be
stacked) are left out. Costs some tens of steps and the start-up of every candidate; name an
execution to save them. A run that resumes takes the execution that it began with.

On a CPU there is nothing to measure: stacking loses wherever it was tried (see
`fastdml.engine.stacked`), and a choice by measurement could differ between two runs of the same
settings, which would then differ in rounding.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdml.engine.snapshot import Snapshot
from fastdml.engine.step import StepOutput
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.engine import Step

WARM_UP, TIMED = 3, 10  # steps of each candidate


class AutoStep:
    """A step that becomes another at its first call."""

    def __init__(
        self, names: Sequence[str], make: Callable[[str], Step], device: torch.device
    ) -> None:
        self.names, self.make, self.device = names, make, device
        self.chosen: Step | None = None

    def __getattr__(self, name: str) -> Any:
        """`update`, `tensors` and the rest of the chosen step."""
        if name.startswith("__") or self.__dict__.get("chosen") is None:
            raise AttributeError(f"{name!r}: the execution is chosen at the first step")
        return getattr(self.chosen, name)

    def __call__(self, *batch: Tensor) -> StepOutput:
        if self.chosen is None:
            self.chosen = self._choose(batch)
        return self.chosen(*batch)

    def _choose(self, batch: tuple[Tensor, ...]) -> Step:
        steps, times = {}, {}
        # Stacking first: it moves the weights, whose addresses a graph made earlier would keep.
        for name in sorted(self.names, key=lambda name: name != "stacked"):
            try:
                step = self.make(name)
                times[name] = self._seconds(step, batch)
            except (InputError, torch.cuda.OutOfMemoryError):
                continue
            if getattr(step, "failure", None) is None:
                steps[name] = step
        if not steps:
            return self.make("eager")  # which says what is wrong
        best = min(steps, key=times.__getitem__)
        able = [name for name in self.names if name in steps]
        found = ", ".join(f"{name} {1000 * times[name]:.2f}" for name in able)
        print(f"execution: {best} (ms a step: {found})", file=sys.stderr)
        return steps[best]

    def _seconds(self, step: Step, batch: tuple[Tensor, ...]) -> float:
        """Of one step, from calls that nothing waits between. Leaves no trace."""
        snapshot = Snapshot(step.tensors, self.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the one that is chosen says it again
                for _ in range(WARM_UP):
                    step(*batch)
            self._wait()
            started = time.perf_counter()
            for _ in range(TIMED):
                step(*batch)
            self._wait()
            return (time.perf_counter() - started) / TIMED
        finally:
            snapshot.restore()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
