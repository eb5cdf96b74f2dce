"""The eager training step: forward all peers, one fused loss, one backward, one update.

The loss returns the gradients of the logits, so autograd starts there: no loss graph, no scalar
to sum, one backward pass through all peers. Nothing waits for the device. Each peer's backward
touches that peer alone, since the targets are constants.

"simultaneous" updates all peers from the same predictions: K forward and K backward passes a step.

"sequential" is the paper's Algorithm 1: peer 1 is updated, its predictions on the same batch are
recomputed, peer 2 is updated against those, and so on. Only the peer just updated is recomputed,
since the others' predictions could not have changed: 2K - 1 forward and K backward passes. The
recomputation runs in training mode, as the paper's does, but leaves BatchNorm's running statistics
alone: they take in each batch once, in the pass that the peer's own update uses. A peer's loss is
reported as it was just before its own update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from fastdml.engine.amp import Amp
from fastdml.engine.ema import Ema
from fastdml.engine.update import Update
from fastdml.errors import InputError
from fastdml.loss import MutualLoss, MutualStats

if TYPE_CHECKING:
    from fastdml.cohort import Cohort


class StepOutput(NamedTuple):
    """Device tensors; reading one waits for the step to finish."""

    losses: Tensor  # (K,)
    stats: MutualStats


class After(Protocol):
    """What a caller adds to the end of a step, with tensors on the device alone: it may become part
    of a graph and is then called only while that is captured."""

    def __call__(self, output: StepOutput, update: Update) -> None: ...

    def tensors(self) -> list[Tensor]:
        """Those that it changes, the same ones always."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What every execution understands; the meaning of each is documented at `make_step`."""

    compile: bool = False
    grad_clip: float | None = None
    accumulate: int = 1
    ema: Ema | None = None
    assemble: Callable[..., tuple[Tensor, Tensor]] | None = None
    after: After | None = None


class EagerStep:
    """`step(images, labels)`. Afterwards, with fp16, `step.update.overflow` (K,) is 1 where a peer
    skipped its update, and `step.update.skipped` () is 1 where all did."""

    name = "eager"

    def __init__(
        self,
        cohort: Cohort,
        loss: MutualLoss,
        optimizer: Optimizer,
        amp: Amp,
        options: StepOptions,
    ) -> None:
        self.cohort, self.peers = cohort, list(cohort.peers)
        self.loss, self.optimizer, self.amp, self.options = loss, optimizer, amp, options
        self.update = Update(cohort, optimizer, amp, grad_clip=options.grad_clip, ema=options.ema)
        self.forwards = self.networks()
        if options.compile:
            self.forwards = [torch.compile(network) for network in self.forwards]

    def networks(self) -> list[nn.Module]:
        """What is run, and compiled if asked."""
        return self.peers

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes."""
        return self.update.tensors() + (self.options.after.tensors() if self.options.after else [])

    def __call__(self, *batch: Tensor) -> StepOutput:
        images, labels = self.options.assemble(*batch) if self.options.assemble else batch
        output = self.train(images, labels)
        self.update.finish()
        if self.options.after:
            self.options.after(output, self.update)
        return output

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        parts = self.options.accumulate
        if parts == 1:
            output = self.gradients(images, labels)
        else:
            if len(labels) % parts:
                raise InputError(
                    f"a batch of {len(labels)} images does not split into accumulate={parts} equal "
                    "parts: choose a batch size that does"
                )
            batches = zip(images.chunk(parts), labels.chunk(parts), strict=True)
            output = _mean_of([self.gradients(x, y) for x, y in batches])
        self.update.apply(range(len(self.peers)))
        return output

    def gradients(self, images: Tensor, labels: Tensor) -> StepOutput:
        """Adds the gradients of a part of the batch to the weights' own."""
        logits = self.logits(images)
        losses, stats, grads = self.loss.value_and_grad([z.detach() for z in logits], labels)
        self.backward(logits, grads)
        return StepOutput(losses, stats)

    def logits(self, images: Tensor) -> list[Tensor]:
        """K tensors (N, C)."""
        return [self.forward(k, images) for k in range(len(self.peers))]

    def forward(self, k: int, images: Tensor) -> Tensor:
        """Logits (N, C) of peer k; fp16 ones as fp32, so that their gradients are scaled before
        they are rounded to fp16, not after."""
        with self.amp.autocast():
            z = self.forwards[k](images)
        return z.float() if z.dtype == torch.float16 else z

    def backward(self, logits: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        trained = [(z, g) for z, g in zip(logits, grads, strict=True) if z.requires_grad]
        logits, grads = map(list, zip(*trained, strict=True))
        self.scale_(grads)
        torch.autograd.backward(logits, grads)

    def scale_(self, grads: list[Tensor]) -> None:
        if self.options.accumulate > 1:
            torch._foreach_mul_(grads, 1 / self.options.accumulate)
        if self.amp.scaler is not None:
            torch._foreach_mul_(grads, self.amp.scaler.scale)


class SequentialStep(EagerStep):
    """Algorithm 1. With fp16 the scale follows once a training step, after all peers."""

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        K = len(self.peers)
        logits = self.logits(images)
        predictions = [z.detach() for z in logits]
        rounds = []  # the loss as each peer met it
        for k in range(K):
            losses, stats, grads = self.loss.value_and_grad(predictions, labels)
            rounds.append(StepOutput(losses, stats))
            if not logits[k].requires_grad:
                continue
            self.backward([logits[k]], [grads[k]])
            self.update.apply([k])
            if k + 1 < K:
                with torch.no_grad(), running_statistics_kept(self.peers[k]):
                    predictions[k] = self.forward(k, images)
        return _own_rounds(rounds)


def _mean_of(parts: list[StepOutput]) -> StepOutput:
    """Of parts of equal size: means of means, sums of counts."""
    mean = [torch.stack(values).mean(0) for values in zip(*(p.stats for p in parts), strict=True)]
    stats = MutualStats(*mean)
    counts = {name: getattr(stats, name) * len(parts) for name in ("correct", "ensemble_correct")}
    return StepOutput(torch.stack([p.losses for p in parts]).mean(0), stats._replace(**counts))


def _own_rounds(rounds: list[StepOutput]) -> StepOutput:
    """Peer k's figures from the k-th round; the ensemble's from the first, before any update."""

    def own(field: str) -> Tensor:
        return torch.stack([getattr(stats, field)[k] for k, (_, stats) in enumerate(rounds)])

    return StepOutput(
        torch.stack([losses[k] for k, (losses, _) in enumerate(rounds)]),
        rounds[0][1]._replace(
            ce=own("ce"),
            kl=own("kl"),
            entropy=own("entropy"),
            correct=own("correct"),
            pairwise_kl=torch.stack(  # (K, K): column k is what student k met
                [stats.pairwise_kl[:, k] for k, (_, stats) in enumerate(rounds)], dim=1
            ),
        ),
    )


@contextmanager
def running_statistics_kept(peer: nn.Module) -> Iterator[None]:
    """Normalisation layers in training mode use the batch's statistics and record nothing."""
    layers = [m for m in peer.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
