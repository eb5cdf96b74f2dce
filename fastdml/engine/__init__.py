"""One training step over a cohort, in several executions behind one call.

Each execution is a small class in its own file with the same constructor and the same call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from fastdml.engine.amp import Amp, resolve
from fastdml.engine.optimizers import Schedule, learning_rates, make_optimizer
from fastdml.engine.step import EagerStep, SequentialStep, StepOutput
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.loss import MutualLoss

__all__ = ["Amp", "Schedule", "StepOutput", "learning_rates", "make_optimizer", "make_step"]

EXECUTIONS = {"eager": {"simultaneous": EagerStep, "sequential": SequentialStep}}


def make_step(
    cohort: Cohort,
    loss: MutualLoss,
    optimizer: Optimizer,
    *,
    execution: str = "auto",
    amp: str | Amp = "auto",
    compile: bool = False,
    update: str = "simultaneous",
    grad_clip: float | None = None,
) -> EagerStep:
    """`step(images, labels) -> StepOutput(losses, stats)`; device tensors, no synchronisation.

    execution: "eager", or "auto" for the fastest there is. amp: "auto", "off", "bf16", "fp16" or a
    resolved `Amp`. update: "simultaneous" or "sequential" (the paper's Algorithm 1). grad_clip:
    largest norm of one peer's gradient.
    """
    name = "eager" if execution == "auto" else execution
    if name not in EXECUTIONS:
        raise InputError(
            f"execution {execution!r} does not exist; use auto or {', '.join(EXECUTIONS)}"
        )
    if update not in EXECUTIONS[name]:
        raise InputError(f"update must be simultaneous or sequential, not {update!r}")
    if isinstance(amp, str):
        device = next(cohort.parameters()).device
        amp = resolve(amp, device)
    kind = EXECUTIONS[name][update]
    return kind(cohort, loss, optimizer, amp, compile=compile, grad_clip=grad_clip)
