"""What the loop asks of a source of batches, and the adapter for iterables such as a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdml.errors import InputError


class Batches(Protocol):
    """`epoch(e, start)` gives the batches of epoch e from step `start` on, on the device.

    A run resumes exactly within an epoch where these are the same each time they are asked for, as
    those of `data.ResidentLoader` are.

    A source may also offer `index(e, step)`, small tensors on the device, and `assemble(*index)`,
    which makes the batch from them and does nothing else: on CUDA the step then assembles its batch
    itself, as part of its graph where it has one.
    """

    batch_size: int

    def __len__(self) -> int: ...  # steps an epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class IterableBatches:
    """Batches from any sized iterable of (images, labels), moved to the device.

    Resuming within an epoch reads and drops the batches already done; that is exact where the order
    depends on the epoch alone (a sampler with `set_epoch`, or no shuffling).
    """

    def __init__(self, source: Any, device: torch.device) -> None:
        self.source, self.device = source, device
        self.batch_size = getattr(source, "batch_size", None) or 1

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        sampler = getattr(self.source, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        drawn = torch.get_rng_state()
        batches = iter(self.source)
        for _ in range(start):
            next(batches)
        if start:  # what was done again must not move on what the peers draw
            torch.set_rng_state(drawn)
        for images, labels in batches:
            images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(self.device, non_blocking=True)


def assembler(source: Batches, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`source.assemble` where the step is to make its batches itself."""
    return getattr(source, "assemble", None) if device.type == "cuda" else None


def as_batches(source: Any, device: torch.device) -> Batches:
    if callable(getattr(source, "epoch", None)):
        batches = source
    elif hasattr(source, "__len__") and hasattr(source, "__iter__"):
        batches = IterableBatches(source, device)
    else:
        raise InputError(
            f"batches must have a length and be iterable, as a DataLoader; "
            f"a {type(source).__name__} is not"
        )
    if len(batches) == 0:
        raise InputError("there is not one batch to train on: fewer images than the batch size?")
    return batches
