"""The images of the benchmarks: real ones where they are found, else random ones of the same size;
the tables say which. Random pixels cost a decoder more than real ones."""

from __future__ import annotations

from pathlib import Path

import torch

from fastdml.data import ImageSet, load_cifar100


def cifar100(root: str, count: int = 50_000) -> tuple[ImageSet, str]:
    """`count` training images, and their description for the tables."""
    if any(Path(root).glob("cifar-100*")):
        return load_cifar100(root)[0].subset(count), "CIFAR-100"
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randperm(count, generator=generator) % 100
    names = tuple(map(str, range(100)))
    images = ImageSet(made, labels, 100, names, mean=(128.0,) * 3, std=(64.0,) * 3)
    return images, f"random images, since there is no CIFAR-100 in {root!r}"
