"""fastdml beside the usual loop on this machine: losses with their gradients, and training steps.

The usual loop is `pairwise`: a kl_div for each pair of peers, a backward pass and an optimizer for
each. Both get the same inputs, both steps start from the same weights and compute in the same
precision, and their first results are compared before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.amp import Amp, resolve_amp
from fastdml.errors import InputError
from fastdml.loss import MutualLoss, mutual_loss
from fastdml.machine import pairwise
from fastdml.machine.timing import interleave, wall

LOSSES = {  # (K, N, C): CIFAR-100's, more peers, ImageNet's classes, a vocabulary
    "cpu": ((2, 64, 100), (4, 128, 100), (4, 256, 1000)),
    "cuda": ((2, 64, 100), (4, 1024, 1000), (2, 512, 32_000)),
}
PEERS, BATCH, SIDE, CLASSES = ("resnet32", "resnet32"), 64, 32, 100  # the paper's on CIFAR-100
SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
LOSS_SHARE = 0.06  # of the seconds, for each loss; the steps share what is left
LOSS_TOLERANCE = 1e-4  # of losses and gradients, relative to the largest; both in float32
STEP_TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 2e-2}  # of the first losses; fp32 may be TF32


class Contest(NamedTuple):
    """One thing that both do."""

    name: str
    ours: Callable[[], Any]
    usual: Callable[[], Any]
    difference: float  # of their first results, relative
    tolerance: float
    note: str = ""


class Measured(NamedTuple):
    """Seconds a call of both, one sample a round; none where their results differ."""

    name: str
    ours: list[float]
    usual: list[float]
    difference: float
    note: str = ""


def measure(device: torch.device, seconds: float) -> Iterator[Measured]:
    """Measures everything in about so many seconds, building included."""
    end = time.perf_counter() + seconds
    losses = [partial(_loss_contest, shape, device) for shape in LOSSES[device.type]]
    steps = [partial(_step_contest, amp, device) for amp in _precisions(device)]
    for k, make in enumerate([*losses, *steps]):
        start = time.perf_counter()
        share = LOSS_SHARE * seconds
        if k >= len(losses):
            share = (end - start) / (len(losses) + len(steps) - k)
        contest = make()
        yield _time(contest, device, max(start + share - time.perf_counter(), 0.0))


def _time(contest: Contest, device: torch.device, seconds: float) -> Measured:
    if not contest.difference <= contest.tolerance:  # NaN too
        return Measured(contest.name, [], [], contest.difference, contest.note)
    timers = {"ours": wall(contest.ours, device), "usual": wall(contest.usual, device)}
    samples = interleave(timers, seconds, fewest=3, most=200)
    return Measured(contest.name, **samples, difference=contest.difference, note=contest.note)


def _loss_contest(shape: tuple[int, int, int], device: torch.device) -> Contest:
    """Forward and backward of the loss, float32."""
    K, N, C = shape
    draw = torch.Generator(device).manual_seed(0)
    logits = [
        torch.randn(N, C, generator=draw, device=device).mul_(2).requires_grad_() for _ in range(K)
    ]
    labels = torch.randint(C, (N,), generator=draw, device=device)

    def ours() -> tuple[list[Tensor], list[Tensor]]:
        losses = mutual_loss(logits, labels)
        return list(losses), list(torch.autograd.grad(losses.sum(), logits))

    def usual() -> tuple[list[Tensor], list[Tensor]]:
        losses = pairwise.losses(logits, labels)
        return losses, pairwise.gradients(losses, logits)

    pairs = list(zip(ours(), usual(), strict=True))
    difference = max(_difference(a, b) for a, b in pairs)
    name = f"loss and gradients, {K} peers, {N:,} x {C:,}"
    return Contest(name, ours, usual, difference, LOSS_TOLERANCE)


def _precisions(device: torch.device) -> list[Amp]:
    """float32, and where the hardware has a faster precision that too."""
    full, native = resolve_amp("off", device), resolve_amp("auto", device)
    return [full] if native.name == full.name else [full, native]


def _step_contest(amp: Amp, device: torch.device) -> Contest:
    """A training step of two peers on one batch that lies on the device."""
    draw = torch.Generator(device).manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=draw, device=device)
    labels = torch.randint(CLASSES, (BATCH,), generator=draw, device=device)
    peers = [Cohort(PEERS, CLASSES, seed=0).to(device).train() for _ in range(2)]

    usual_loop = pairwise.Loop(
        list(peers[0].peers), lambda weights: torch.optim.SGD(weights, **SETTINGS), amp.dtype
    )
    cohort = peers[1].to(memory_format=torch.channels_last)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, "sgd", **SETTINGS), amp=amp)
    ours = partial(step, images.contiguous(memory_format=torch.channels_last), labels)
    usual = partial(usual_loop, images, labels)
    difference = _difference([ours().losses], [torch.tensor(usual(), device=device)])
    ours()  # the second call captures, or is the first without proofs
    name = f"step, {len(PEERS)} {PEERS[0]}, batch {BATCH}, {amp.name}"
    return Contest(
        name, ours, usual, difference, STEP_TOLERANCE[amp.name], note=f"execution {step.name}"
    )


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one, relative to the largest that is expected."""
    largest = max(float(e.detach().abs().max()) for e in expected)
    errors = (f.detach() - e.detach() for f, e in zip(found, expected, strict=True))
    return max(float(error.abs().max()) for error in errors) / largest


def spread(samples: list[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    low, _, high = quantiles(samples, n=4)
    return (high - low) / 2 / median(samples)


def verdict(measured: Measured) -> str:
    """In words; only a difference beyond the quartiles of both counts."""
    ratio = median(measured.usual) / median(measured.ours)
    ours, usual = quantiles(measured.ours, n=4), quantiles(measured.usual, n=4)
    if ours[2] < usual[0]:
        return f"{ratio:.2f}x as fast"
    if usual[2] < ours[0]:
        return f"slower: {ratio:.2f}x as fast"
    return f"no clear difference ({ratio:.2f}x)"


def check_seconds(seconds: float) -> None:
    """Raises InputError for less than a second, or more than a day."""
    if not 1 <= seconds <= 86_400:
        raise InputError(f"--seconds must be within 1..86400, not {seconds:g}")
