"""The loss in a loop with a backward and an optimizer for each peer, on scikit-learn's digits.

python examples/optimizer_per_peer.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastdml import mutual_losses


def main(epochs: int = 5) -> list[float]:
    """Accuracy of each peer on the last 360 images."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16  # (1797, 64)
    labels = torch.tensor(digits.target)
    peers = [
        nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)) for width in (64, 128)
    ]
    optimizers = [
        torch.optim.SGD(peers[0].parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        torch.optim.AdamW(peers[1].parameters(), lr=3e-3),
    ]

    for _ in range(epochs):
        for batch in torch.randperm(1437).split(64):
            losses = mutual_losses([peer(images[batch]) for peer in peers], labels[batch])
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    with torch.no_grad():
        return [
            (peer(images[1437:]).argmax(1) == labels[1437:]).float().mean().item() for peer in peers
        ]


if __name__ == "__main__":
    print("accuracy of each peer:", main())
