"""One optimizer for all peers, a parameter group each, and its learning rate on the device.

The fused implementation updates the tensors of all peers in a few launches. The learning rate is
one 0-d tensor shared by the groups, so a schedule never re-captures a CUDA graph, and the schedule
is a table on the device, so a step in which fp16 skipped every peer holds it back without the host
knowing. Two of Apex's optimizers take a number instead; the host then counts, skipped or not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastdml.engine.apex import NAMES as APEX_NAMES
from fastdml.engine.apex import make_apex_optimizer, takes_number
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(
    cohort: Cohort,
    name: str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> Optimizer:
    """name: "sgd", "adam", "adamw", or with NVIDIA Apex "apex_sgd", "apex_adam", "apex_lamb";
    `momentum` is the first beta of all but SGD."""
    groups = [
        {"params": [w for w in peer.parameters() if w.requires_grad]} for peer in cohort.peers
    ]
    tensors = [w for group in groups for w in group["params"]]
    if not tensors:
        raise InputError("no peer has a parameter to train: all have requires_grad=False")
    device = tensors[0].device
    if name in APEX_NAMES:
        return make_apex_optimizer(
            name,
            [group for group in groups if group["params"]],
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            device=device,
        )
    rate = torch.tensor(lr, dtype=torch.float32, device=device)
    fused = device.type in FUSED_DEVICES
    if name == "sgd":
        nesterov = nesterov and momentum > 0
        optimizer = SGD(
            groups, rate, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
        )
        if momentum > 0:
            # The fused kernel fills buffers it makes itself on the first step only, and not when
            # that step overflows: fp16 would then go on with uninitialised memory.
            for w in tensors:
                optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
        return optimizer
    if name in ("adam", "adamw"):
        kind = Adam if name == "adam" else AdamW
        return kind(groups, rate, (momentum, 0.999), weight_decay=weight_decay, fused=fused)
    known = ", ".join(("sgd", "adam", "adamw", *APEX_NAMES))
    raise InputError(f"optimizer must be one of {known}, not {name!r}")


def learning_rates(
    *,
    lr: float,
    epochs: int,
    steps: int,  # an epoch
    schedule: str = "step",
    drop_every: int = 60,  # epochs
    drop_factor: float = 0.1,
    warmup_epochs: float = 0.0,
) -> Tensor:
    """The rate of every step of a run, (epochs * steps,) fp32 on the host.

    "step": lr * drop_factor**(epoch // drop_every). "cosine": half a cosine from lr to 0 over the
    steps after the warm-up. Warm-up rises linearly to the full rate at its last step.
    """
    total = epochs * steps
    warmup = min(round(warmup_epochs * steps), total)
    step = torch.arange(total, dtype=torch.float64)
    if schedule == "step":
        factor = drop_factor ** (step // (drop_every * steps))
    elif schedule == "cosine":
        past = ((step - warmup) / max(total - warmup, 1)).clamp(min=0)
        factor = (1 + (math.pi * past).cos()) / 2
    else:
        raise InputError(f"schedule must be step or cosine, not {schedule!r}")
    if warmup:
        factor = factor * ((step + 1) / warmup).clamp(max=1)
    return (lr * factor).float()


class Schedule:
    """Feeds the optimizer's learning rate from a table on the device; `advance` after each step.

    What `advance` changes on the device is in `tensors()`, so it can be part of a captured step.
    """

    def __init__(self, optimizer: Optimizer, rates: Tensor) -> None:
        device = next(w for group in optimizer.param_groups for w in group["params"]).device
        self.optimizer = optimizer
        self.rates = rates.to(device)  # (steps of the run,)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # updates made so far
        self.numbers: list[float] | None = None  # the same table, for an optimizer that needs it
        if takes_number(optimizer):
            self.numbers = rates.tolist()
            self.position = 0
        self.lr = torch.empty((), dtype=torch.float32, device=device)
        self._publish()

    def advance(self, skipped: Tensor | None = None) -> None:
        """Moves on by one update, or by none where `skipped` (0-d, 0 or 1) is 1. Never waits."""
        if self.numbers is not None:
            self.position += 1
            skipped = None
        self.updates += 1 if skipped is None else (1 - skipped).long()
        self._publish()

    def load(self, updates: Tensor) -> None:
        """Goes to a saved position; call after the optimizer has loaded its own state."""
        self.updates.copy_(updates)
        if self.numbers is not None:
            self.position = int(updates)
        self._publish()

    def tensors(self) -> list[Tensor]:
        return [self.updates, self.lr]

    def _publish(self) -> None:
        last = len(self.rates) - 1
        self.lr.copy_(self.rates.index_select(0, self.updates.clamp(max=last).view(1))[0])
        lr = self.lr if self.numbers is None else self.numbers[min(self.position, last)]
        for group in self.optimizer.param_groups:  # an optimizer that loaded has copies of its own
            group["lr"] = lr
