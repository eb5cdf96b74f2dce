"""What every loader shares: how many steps an epoch has, and which samples a step shows."""

from __future__ import annotations

import torch

from fastdml.data.counter import check_seed
from fastdml.data.samplers import Order, RandomSampler, Sampler, check_rank, part
from fastdml.errors import InputError


class Batching:
    """In training the order is the sampler's and a last batch too short for all ranks is dropped.
    In evaluation the order is the set's and the last batch may be short; every rank sees all of it.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        sampler: Sampler | None,
        rank: int,
        world: int,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: give at least 1")
        check_rank(rank, world)
        self.n, self.batch_size, self.train = n, batch_size, train
        self.seed = check_seed(seed)
        self.rank, self.world = (rank, world) if train else (0, 1)
        self.sampler = (sampler or RandomSampler(n)) if train else None
        self._kept: tuple[int, Order] | None = None  # an epoch and its order
        if not train:
            self._steps = -(-n // batch_size)
            return
        groups = getattr(self.sampler, "k", 1) * getattr(self.sampler, "p", 1)
        if groups > 1 and batch_size != groups:
            raise InputError(
                f"batch size {batch_size} for {self.sampler.p} identities x {self.sampler.k} "
                f"images: give {groups}"
            )
        places = self.sampler.places
        self._steps = places // (batch_size * world)
        if self._steps == 0:
            ranks = f" x {world} ranks" if world > 1 else ""
            raise InputError(
                f"batch size {batch_size}{ranks} is larger than the {places} training images: "
                f"give {places // world} or less, or more images"
            )

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Order:
        """Of all ranks; kept until another epoch is asked for."""
        epoch = epoch if self.train else 0
        if self._kept is None or self._kept[0] != epoch:
            if self.sampler is None:
                order = Order(torch.arange(self.n, device=device), None)
            else:
                order = self.sampler.order(self.seed, epoch, device)
            self._kept = epoch, order
        return self._kept[1]

    def __len__(self) -> int:
        return self._steps

    def part(self, epoch: int, step: int) -> slice:
        if epoch < 0 or not 0 <= step < self._steps:
            raise IndexError(
                f"epoch {epoch}, step {step}: an epoch has steps 0 to {self._steps - 1}"
            )
        return part(step, self.batch_size, self.rank, self.world)
