"""The loss inside torch.compile: forward of both peers and the loss as one graph, no breaks.

python examples/compiled_step.py
"""

from __future__ import annotations

import torch
from torch import nn

from fastdml import mutual_loss


def main(steps: int = 20, backend: str = "inductor") -> tuple[float, float]:
    """Sum of the losses at the first and at the last step, on one batch of random data."""
    torch.manual_seed(0)
    peers = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(2)]
    optimizer = torch.optim.SGD([p for peer in peers for p in peer.parameters()], lr=1.0)
    inputs, labels = torch.randn(128, 32), torch.randint(0, 10, (128,))

    @torch.compile(fullgraph=True, backend=backend)
    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return mutual_loss([peer(inputs) for peer in peers], labels).sum()

    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(inputs, labels)
        value.backward()
        optimizer.step()
        seen.append(value.detach())
    return seen[0].item(), seen[-1].item()


if __name__ == "__main__":
    print("loss at the first and the last step:", main())
