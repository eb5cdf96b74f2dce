"""Small peers with blocks, and their batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdml import Cohort

C = 5


class Block(nn.Module):
    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """Odd widths, so that parts of weights are uneven, and a weight of one entry, of which most
    ranks have none."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, normed), Block(width, normed))
        self.head = nn.Linear(width, C)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.blocks(self.stem(x)).mean((2, 3)))


def cohort(K: int = 2, *, normed: bool = False, dtype: torch.dtype = torch.float64) -> Cohort:
    torch.manual_seed(0)
    return Cohort([Net(5 + 2 * k, normed) for k in range(K)], C).to(dtype)


def batch(step: int, rows: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(rows, 3, 6, 6, generator=generator, dtype=dtype)
    return images, torch.randint(C, (rows,), generator=generator)


def whole(t: Tensor) -> Tensor:
    """A shard's values of all ranks, a collective; other tensors as they are."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone()
