"""A weight or a temperature of the loss that changes over training, as a tensor that is filled in
place.

Since the tensor stays the same object, a captured CUDA graph and compiled code follow it. Its value
at every step is computed once, as a table on the device, so that a step costs two small launches,
allocates nothing and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdml.errors import InputError

ScheduleKind = Literal["constant", "linear", "cosine"]


def _table(
    start: float, end: float | None, steps: int, kind: str, warmup: int, warmup_from: float
) -> Tensor:
    """The value at each of `steps` steps, (steps,) float32 on the host; see `ScalarSchedule`."""
    if kind not in get_args(ScheduleKind):
        raise InputError(f"kind {kind!r}: give one of {', '.join(get_args(ScheduleKind))}")
    if (end is None) != (kind == "constant"):
        needs = "takes no end" if kind == "constant" else "needs an end, its last value"
        raise InputError(f"a schedule of kind {kind} {needs}")
    if steps < 1 or not 0 <= warmup <= steps:
        raise InputError(
            f"{steps} steps with a warm-up of {warmup}: give 1 step or more, and a warm-up within "
            "them"
        )
    numbers = (start, warmup_from, start if end is None else end)
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"a schedule between {numbers}: give finite numbers")
    step = torch.arange(steps, dtype=torch.float64, device="cpu")
    way = ((step - warmup) / max(steps - 1 - warmup, 1)).clamp(0, 1)  # from start to end
    if kind == "cosine":
        way = (1 - (math.pi * way).cos()) / 2
    values = start + (numbers[-1] - start) * way
    if warmup:
        risen = (step + 1) / warmup
        values = torch.where(step < warmup, warmup_from + (start - warmup_from) * risen, values)
    return values.float()


class ScalarSchedule:
    """A number that follows a schedule, as the 0-d float32 tensor `value`, filled in place.

        kl_weight = ScalarSchedule(0.0, 1.0, steps=1000, device=device)
        loss = MutualLoss(kl_weight=kl_weight.value)
        for images, labels in batches:
            ...  # a step with this loss
            kl_weight.advance()

    kind: how it goes from `start`, at the first step after the warm-up, to `end`, at the last of
        `steps`: "linear"; "cosine", half a cosine, slow at both ends; "constant", without `end`.
        From then on it stays.
    warmup: steps in which it first goes linearly from `warmup_from` to `start`, which it reaches
        at the last of them.

    Raises InputError for an unknown kind, an end that is missing or too much, numbers of steps
    that do not fit and values that are not finite. As a temperature it must stay above 0, as a
    weight not below: on a device nobody looks at the values of tensors.
    """

    def __init__(
        self,
        start: float,
        end: float | None = None,
        *,
        steps: int,
        kind: ScheduleKind = "linear",
        warmup: int = 0,
        warmup_from: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        values = _table(start, end, steps, kind, warmup, warmup_from)
        self._values = values.to(device)  # (steps,)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # the steps made, (1,)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the same, within the table
        self._value = self._values[:1].clone()
        self.value = self._value[0]  # a view

    def advance(self, skipped: Tensor | None = None) -> None:
        """Moves on by one step, or by none where `skipped` (0-d, 0 or 1) is 1, as
        `step.update.skipped` of a step in fp16. Never waits; may be part of a captured step."""
        self.step.add_(1 if skipped is None else (1 - skipped).long())
        self._fill()

    def last(self) -> float:
        """The value at the step that was made last, for a log. Waits for the device."""
        return float(self._values[max(min(int(self.step), len(self._values)) - 1, 0)])

    def tensors(self) -> list[Tensor]:
        """Those that `advance` changes."""
        return [self.step, self._at, self.value]

    def state_dict(self) -> dict[str, Any]:
        """How far it has come; the schedule itself is not in it. Waits for the device."""
        return {"step": int(self.step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was."""
        self.step.fill_(state["step"])
        self._fill()

    def _fill(self) -> None:
        torch.clamp(self.step, max=len(self._values) - 1, out=self._at)
        torch.index_select(self._values, 0, self._at, out=self._value)
