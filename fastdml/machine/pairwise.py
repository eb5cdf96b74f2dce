"""The habit of chxy95/Deep-Mutual-Learning and of most repositories since: a kl_div for each pair.

Each peer has its own optimizer and its own backward pass, each ordered pair its own softmax,
log_softmax and kl_div (K (K - 1) of them), and loss and accuracy are read with `.item()` at every
step of every peer, which waits for the device 2 K times a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


def losses(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """L_k = CE_k + mean over l != k of KL(p_l || p_k); the teachers are constants."""
    result = []
    for k, student in enumerate(logits):
        kl: float | Tensor = 0.0
        for teacher, other in enumerate(logits):
            if teacher != k:
                kl = kl + F.kl_div(
                    F.log_softmax(student, dim=1),
                    F.softmax(other.detach(), dim=1),
                    reduction="batchmean",
                )
        result.append(F.cross_entropy(student, labels) + kl / max(len(logits) - 1, 1))
    return result


def gradients(losses: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """One backward pass a peer."""
    return [torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, logits, strict=True)]


class Loop:
    """amp: the dtype of an autocast around the forward passes, as the better kept loops have."""

    def __init__(
        self,
        peers: Sequence[nn.Module],
        optimizer: Callable[[list[Tensor]], Optimizer],
        amp: torch.dtype | None = None,
    ) -> None:
        self.peers = list(peers)
        self.optimizers = [optimizer(list(peer.parameters())) for peer in self.peers]
        self.amp = amp

    def __call__(self, images: Tensor, labels: Tensor) -> list[float]:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            logits = [peer(images) for peer in self.peers]
        values, accuracies = [], []
        for z, loss, optimizer in zip(logits, losses(logits, labels), self.optimizers, strict=True):
            accuracies.append((z.argmax(dim=1) == labels).float().mean().item())
            values.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return values
