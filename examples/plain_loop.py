"""The loss inside a plain PyTorch loop: two small networks on scikit-learn's digits.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastdml import mutual_loss


def main(epochs: int = 5) -> list[float]:
    """Accuracy of each peer on the last 360 images."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16  # (1797, 64)
    labels = torch.tensor(digits.target)
    peers = [
        nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)) for width in (64, 128)
    ]
    parameters = [p for peer in peers for p in peer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    for _ in range(epochs):
        for batch in torch.randperm(1437).split(64):
            losses = mutual_loss([peer(images[batch]) for peer in peers], labels[batch])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()

    with torch.no_grad():
        return [
            (peer(images[1437:]).argmax(1) == labels[1437:]).float().mean().item() for peer in peers
        ]


if __name__ == "__main__":
    print("accuracy of each peer:", main())
