"""The PyPI package pytorch-dml (`import pydml`) as its users call it: `DMLLoss` for a peer and
`DMLTrainer.train_epoch` for a loop, at temperature 1 (its default is 3) and with the same
optimizers. Raises ImportError where it is missing.

Its trainer runs a backward pass a peer, all but the last with retain_graph, and reads losses and
accuracies with `.item()` at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from pydml import DMLConfig, DMLTrainer
from pydml.core.losses import DMLLoss
from torch import Tensor, nn
from torch.optim import Optimizer

_loss = DMLLoss(temperature=1.0)


def losses(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    return [_loss(z, [other for other in logits if other is not z], labels) for z in logits]


def gradients(losses: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """As its trainer's backward passes."""
    last = len(losses) - 1
    return [
        torch.autograd.grad(loss, z, retain_graph=k < last)[0]
        for k, (loss, z) in enumerate(zip(losses, logits, strict=True))
    ]


class Loop:
    def __init__(
        self,
        peers: Sequence[nn.Module],
        optimizer: Callable[[list[Tensor]], Optimizer],
        device: torch.device,
    ) -> None:
        self.trainer = DMLTrainer(
            list(peers),
            config=DMLConfig(temperature=1.0),
            device=str(device),
            optimizers=[optimizer(list(peer.parameters())) for peer in peers],
        )

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        """The peers' mean losses."""
        metrics = self.trainer.train_epoch(batches, epoch=1)
        return [metrics[f"train_loss_model_{k}"] for k in range(self.trainer.num_models)]
