"""The loss inside PyTorch Lightning: the cohort is one module with one optimizer.

python examples/lightning_module.py        (needs: pip install lightning)
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import MutualLoss


class MutualLearning(lightning.LightningModule):
    def __init__(self, peers: list[nn.Module], lr: float = 0.1) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)
        self.loss = MutualLoss(return_stats=True)
        self.lr = lr

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        losses, stats = self.loss([peer(images) for peer in self.peers], labels)
        for k in range(len(self.peers)):
            self.log(f"train/kl_{k}", stats.kl[k])
        return losses.sum()

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        for k, peer in enumerate(self.peers):
            self.log(f"val/top1_{k}", (peer(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main(epochs: int = 5) -> dict[str, float]:
    """The last validation's metrics."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1437], labels[:1437]), 64, shuffle=True)
    val = DataLoader(TensorDataset(images[1437:], labels[1437:]), 360)
    peers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2)]
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MutualLearning(peers), train, val)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
