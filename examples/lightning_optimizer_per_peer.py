"""The loss inside PyTorch Lightning with an optimizer and a schedule for each peer (Lightning's
manual optimization), in 16-bit or 32-bit precision alike.

python examples/lightning_optimizer_per_peer.py        (needs: pip install lightning)
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import mutual_losses


class MutualLearning(lightning.LightningModule):
    def __init__(self, peers: list[nn.Module], epochs: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning's way to several optimizers
        self.peers = nn.ModuleList(peers)
        self.epochs = epochs

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        losses, stats = mutual_losses(
            [peer(images) for peer in self.peers], labels, return_stats=True
        )
        for k, (loss, optimizer) in enumerate(zip(losses, self.optimizers(), strict=True)):
            optimizer.zero_grad()
            self.manual_backward(loss)  # peer k's graph alone
            optimizer.step()
            self.log(f"train/kl_{k}", stats.kl[k])

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():  # Lightning steps none of them itself here
            schedule.step()

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        for k, peer in enumerate(self.peers):
            self.log(f"val/top1_{k}", (peer(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> tuple[list, list]:
        optimizers = [
            torch.optim.SGD(self.peers[0].parameters(), lr=0.1, momentum=0.9),
            *(torch.optim.AdamW(peer.parameters(), lr=3e-3) for peer in self.peers[1:]),
        ]
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        return optimizers, [cosine(optimizer, self.epochs) for optimizer in optimizers]


def main(epochs: int = 5, precision: str = "32-true") -> dict[str, float]:
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
        enable_progress_bar=False, enable_model_summary=False, precision=precision,
    )  # fmt: skip
    trainer.fit(MutualLearning(peers, epochs), train, val)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
