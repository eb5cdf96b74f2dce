"""Batches of data that the user gives as arrays or as a data set of torch.

In training their order is a function of (seed, epoch), as that of fastdml's own loaders, so that a
run resumes exactly; a last short batch is left out, and of several ranks each shows its share of
every batch. Arrays are kept on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data import Sampler as TorchSampler

from fastdml.data.samplers import RandomSampler, Sampler, check_share, part
from fastdml.errors import InputError, one_line

NUMBERS = "biufc"  # numpy's kinds of numbers


def is_arrays(source: Any) -> bool:
    """Whether it is a pair (inputs, labels) of arrays or tensors."""
    return isinstance(source, tuple) and len(source) == 2 and all(map(is_array, source))


def is_dataset(source: Any) -> bool:
    """Whether it is a data set of torch that knows its length."""
    known = isinstance(source, Dataset) and not isinstance(source, IterableDataset)
    return known and hasattr(source, "__len__")


def is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


class ArrayBatches:
    """Batches of inputs (N, ...) and labels (N, ...), tensors on the device. seed: of the random
    order of training; None: in the given order, whose last batch may be short. sampler: which order
    that is, by default one of each sample once. rank, world: of training, as of `ResidentLoader`.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int | None = None,
        sampler: Sampler | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_share(batch_size, world)
        self.rank, self.world = rank, world
        self.images = inputs.dim() == 4
        # Of images a batch is in the memory format channels_last without another copy.
        self.inputs = inputs.permute(0, 2, 3, 1).contiguous() if self.images else inputs
        self.labels, self.batch_size, self.seed = labels, batch_size, seed
        self.sampler = sampler or RandomSampler(len(inputs))
        self._order: tuple[int, Tensor] | None = None  # an epoch and its order

    def __len__(self) -> int:
        whole, rest = divmod(len(self.inputs), self.batch_size)
        return whole if self.seed is not None else whole + (rest > 0)

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, len(self), every):
            chosen: Any = self._part(step)
            if self.seed is not None:
                chosen = self.order(epoch, self.seed)[chosen]
            inputs = self.inputs[chosen]
            yield (inputs.permute(0, 3, 1, 2) if self.images else inputs), self.labels[chosen]

    def samples(self, epoch: int, step: int) -> Tensor:
        """Which samples of the arrays the batch shows, (B,) int64 on the device, in its order."""
        if self.seed is not None:
            return self.order(epoch, self.seed)[self._part(step)]
        every = torch.arange(len(self.inputs), device=self.inputs.device)
        return every[self._part(step)]

    def _part(self, step: int) -> slice:
        return part(step, self.batch_size, self.rank, self.world)

    def order(self, epoch: int, seed: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            order = self.sampler.order(seed, epoch, self.inputs.device)
            self._order = epoch, order.sample
        return self._order[1]


def as_tensor(values: Any, what: str) -> Tensor:
    """An array as a tensor; numpy's float64, which it makes of every Python float, as float32.
    what: for messages. Raises InputError for an array of other things than numbers."""
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        if array.dtype.kind in NUMBERS:
            narrow = array.dtype == np.float64
            native = np.float32 if narrow else array.dtype.newbyteorder("=")
            array = np.ascontiguousarray(array, native)
            return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: no array of numbers: {one_line(error)}") from None
    raise InputError(
        f"{what}: an array of {array.dtype} is none of numbers: of labels that are names "
        "numpy.unique(names, return_inverse=True)[1] makes some"
    )


class EpochBatches(TorchSampler[list[int]]):
    """The samples of each batch of an epoch, or of a rank's share of it, in a sampler's order, for
    a DataLoader. A last short batch is left out."""

    def __init__(
        self, sampler: Sampler, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        check_share(batch_size, world)
        self.sampler, self.batch_size, self.seed, self.epoch = sampler, batch_size, seed, 0
        self.rank, self.world = rank, world

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sampler.places // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = self.sampler.order(self.seed, self.epoch).sample.tolist()
        for step in range(len(self)):
            yield order[part(step, self.batch_size, self.rank, self.world)]


def dataset_loader(
    dataset: Any,
    batch_size: int,
    seed: int | None = None,
    sampler: Sampler | None = None,
    *,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Batches of a data set, read in this process. seed, sampler, rank, world: as of
    `ArrayBatches`."""
    # Beginning an epoch draws a number; not from the generator that the peers draw from.
    own = torch.Generator()
    if seed is None:
        return DataLoader(dataset, batch_size, generator=own)
    order = EpochBatches(sampler or RandomSampler(len(dataset)), batch_size, seed, rank, world)
    return DataLoader(dataset, batch_sampler=order, generator=own)
