"""The habit of those who add the peers' losses up: the same kl_div for each pair, but one backward
pass, one optimizer over all peers and one `.item()` a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.machine import pairwise


def gradients(losses: Tensor | Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """One backward pass from the sum."""
    total = losses.sum() if isinstance(losses, Tensor) else sum(losses)
    return list(torch.autograd.grad(total, logits))


class Loop:
    def __init__(
        self, peers: Sequence[nn.Module], optimizer: Callable[[list[Tensor]], Optimizer]
    ) -> None:
        self.peers = list(peers)
        self.optimizer = optimizer([w for peer in self.peers for w in peer.parameters()])

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        """The sum of the losses."""
        losses = pairwise.losses([peer(images) for peer in self.peers], labels)
        total = sum(losses)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return total.item()
