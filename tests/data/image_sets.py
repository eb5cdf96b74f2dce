"""Sets of random images, and of images whose pixels are their index in the set."""

from __future__ import annotations

import torch

from fastdml.data import ImageSet


def random_set(n=50, ch=3, height=8, width=8) -> ImageSet:
    random = torch.Generator().manual_seed(n)
    return ImageSet(
        torch.randint(0, 256, (n, ch, height, width), dtype=torch.uint8, generator=random),
        torch.randint(0, 10, (n,), generator=random),
        10,
        tuple(map(str, range(10))),
        tuple(100.0 + 10 * c for c in range(ch)),
        tuple(50.0 + 5 * c for c in range(ch)),
    )


def numbered_set(n: int) -> ImageSet:
    """The label of a sample is its place in the set, and so are its pixels."""
    place = torch.arange(n)
    images = place.to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous()
    return ImageSet(images, place, n, tuple(map(str, range(n))), (0.0,), (1.0,))
