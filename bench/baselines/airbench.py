"""Batched augmentation in torch, as airbench does it (Jordan 2024, "94% on CIFAR-10 in 3.29
seconds"): the set on the device, normalised and padded once; each batch is cropped by masked
copies, one for each shift of rows and of columns, and half of it flipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdml.data import ImageSet


def crop(images: Tensor, size: int) -> Tensor:
    """Random crops of (B, ch, size + 2 r, size + 2 r): first all rows, then all columns."""
    r = (images.shape[-1] - size) // 2
    shifts = torch.randint(-r, r + 1, (len(images), 2), device=images.device)
    rows = images.new_empty(len(images), images.shape[1], size, size + 2 * r)
    for s in range(-r, r + 1):
        chosen = shifts[:, 0] == s
        rows[chosen] = images[chosen, :, r + s : r + s + size, :]
    out = images.new_empty(len(images), images.shape[1], size, size)
    for s in range(-r, r + 1):
        chosen = shifts[:, 1] == s
        out[chosen] = rows[chosen, :, :, r + s : r + s + size]
    return out


def batches(
    images: ImageSet, batch_size: int, device: torch.device, pad: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches, epoch after epoch without end."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (images.mean, images.std))
    pixels = (images.images.contiguous().to(device).float() - mean) / std
    size = pixels.shape[-1]
    padded = torch.nn.functional.pad(pixels, (pad,) * 4, mode="reflect")
    padded = padded.contiguous(memory_format=torch.channels_last)
    labels = images.labels.to(device)
    while True:
        order = torch.randperm(len(labels), device=device)
        for chosen in order.split(batch_size)[: len(labels) // batch_size]:
            x = crop(padded[chosen], size)
            flip = (torch.rand(len(x), device=device) < 0.5).view(-1, 1, 1, 1)
            yield torch.where(flip, x.flip(-1), x), labels[chosen]
