"""Tiny peers and data for tests of whole runs, which take a fraction of a second each."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader

CLASSES, SIDE = 4, 6
CPU = torch.device("cpu")
# What `fit` records of these loaders and peers.
OWN = {
    "data": f"own data: 6 batches of 16, images 1x{SIDE}x{SIDE}",
    "peers": ("TinyPeer", "TinyPeer"),
    "pad": 1,
    "flip": False,
}


class TinyPeer(nn.Module):
    """Convolution, BatchNorm and dropout: everything with a state of its own."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.num_classes = CLASSES
            self.conv = nn.Conv2d(1, width, 3)
            self.norm = nn.BatchNorm2d(width)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def make_cohort(seed: int = 0, widths=(4, 7)) -> Cohort:
    return Cohort([TinyPeer(w, seed + 10 * k) for k, w in enumerate(widths)], CLASSES)


def make_images(n: int, seed: int) -> ImageSet:
    """Class c is bright in quadrant c."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    images = torch.randint(0, 160, (n, 1, SIDE, SIDE), generator=generator)
    half = SIDE // 2
    for c in range(CLASSES):
        rows, columns = half * (c // 2), half * (c % 2)
        images[labels == c, :, rows : rows + half, columns : columns + half] += 90
    names = tuple("abcd")
    return ImageSet(images.to(torch.uint8), labels, CLASSES, names, (100.0,), (60.0,))


def make_loaders(batch_size: int = 16) -> tuple[ResidentLoader, ResidentLoader]:
    """Six steps an epoch."""
    train = ResidentLoader(make_images(100, 1), batch_size, train=True, pad=1, flip=False)
    return train, ResidentLoader(make_images(50, 2), 20, train=False)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
