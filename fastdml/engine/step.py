"""The eager training step: forward all peers, one fused loss, one backward, one optimizer.

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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from fastdml.engine.amp import Amp
from fastdml.loss import MutualLoss, MutualStats

if TYPE_CHECKING:
    from fastdml.cohort import Cohort


class StepOutput(NamedTuple):
    """Device tensors; reading one waits for the step to finish."""

    losses: Tensor  # (K,)
    stats: MutualStats


class EagerStep:
    """`step(images, labels)`; afterwards `step.skipped` is 1 where fp16 overflowed, else 0 (0-d,
    on the device), or None without a scaler."""

    def __init__(
        self,
        cohort: Cohort,
        loss: MutualLoss,
        optimizer: Optimizer,
        amp: Amp,
        *,
        compile: bool = False,
        grad_clip: float | None = None,
    ) -> None:
        self.peers = list(cohort.peers)
        self.forwards = [torch.compile(p) if compile else p for p in self.peers]
        self.loss = loss
        self.optimizer = optimizer
        self.amp = amp
        self.grad_clip = grad_clip
        self.skipped: Tensor | None = None
        if amp.scaler is not None:
            self.skipped = torch.zeros((), device=amp.device)
            optimizer.register_step_post_hook(self._note_overflow)

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutput:
        logits = [self._forward(k, images) for k in range(len(self.peers))]
        losses, stats, grads = self.loss.value_and_grad([z.detach() for z in logits], labels)
        self._backward(logits, grads)
        self._update()
        return StepOutput(losses, stats)

    def _forward(self, k: int, images: Tensor) -> Tensor:
        """Logits (N, C) of peer k; fp16 ones as fp32, so that their gradients are scaled before
        they are rounded to fp16, not after."""
        with self.amp.autocast():
            z = self.forwards[k](images)
        return z.float() if z.dtype == torch.float16 else z

    def _backward(self, logits: list[Tensor], grads: list[Tensor]) -> None:
        trained = [(z, g) for z, g in zip(logits, grads, strict=True) if z.requires_grad]
        logits, grads = map(list, zip(*trained, strict=True))
        if self.amp.scaler is not None:
            grads = self.amp.scaler.scale(grads)
        torch.autograd.backward(logits, grads)

    def _update(self) -> None:
        """Steps the peers that have gradients, and drops these."""
        scaler = self.amp.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.grad_clip:
            for peer in self.peers:
                nn.utils.clip_grad_norm_(peer.parameters(), self.grad_clip)
        if scaler is None:
            self.optimizer.step()
        else:
            self.skipped.fill_(1)  # an optimizer that is not fused is not even called on overflow
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _note_overflow(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        found = getattr(optimizer, "found_inf", None)  # set by the scaler for fused optimizers
        if found is None:
            self.skipped.zero_()
        else:
            self.skipped.copy_(found.view(()))


class SequentialStep(EagerStep):
    """Algorithm 1. With fp16 each peer's update is a step of the scaler's, and the training step
    counts as skipped only where every peer's update was."""

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutput:
        K = len(self.peers)
        logits = [self._forward(k, images) for k in range(K)]
        predictions = [z.detach() for z in logits]
        rounds = []  # the loss as each peer met it
        skipped = []
        for k in range(K):
            losses, stats, grads = self.loss.value_and_grad(predictions, labels)
            rounds.append((losses, stats))
            if not logits[k].requires_grad:
                continue
            self._backward([logits[k]], [grads[k]])
            self._update()
            if self.skipped is not None:
                skipped.append(self.skipped.clone())
            if k + 1 < K:
                with torch.no_grad(), running_statistics_kept(self.peers[k]):
                    predictions[k] = self._forward(k, images)
        if skipped:
            torch.amin(torch.stack(skipped), dim=0, out=self.skipped)
        return _own_rounds(rounds)


def _own_rounds(rounds: list[tuple[Tensor, MutualStats]]) -> StepOutput:
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
