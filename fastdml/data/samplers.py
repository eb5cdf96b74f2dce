"""Which images an epoch shows, in which order: pure functions of (seed, epoch), cut into batches by
(step, rank).

A sampler gives the order of a whole epoch, for all ranks together; the batch of a step is a slice
of it, and each rank shows a share of that slice (`part`). So batches do not depend on the number of
ranks, and resuming, on another number too, means asking for the next slice. An order takes
milliseconds: one sort for the random ones; for `PKSampler` also a Python loop over the groups
(about 3,500 for Market-1501).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdml.data.image_set import IGNORED
from fastdml.data.philox import EPOCH, GROUP, draw, permutation
from fastdml.errors import InputError


class Order(NamedTuple):
    """The samples of an epoch, in order."""

    sample: Tensor  # (M,) int64, index in the set
    repetition: Tensor | None  # (M,) int64: tells showings of one sample apart; None: at most one


class Sampler(Protocol):
    """The interface of a loader's `sampler`."""

    @property
    def places(self) -> int: ...  # of every epoch

    def order(self, seed: int, epoch: int, device: torch.device | str = "cpu") -> Order: ...


def part(step: int, batch_size: int, rank: int = 0, world: int = 1, together: int = 1) -> slice:
    """The places of an epoch's order that `rank` of `world` shows at `step`: its share of the
    `batch_size` places of the batch, the shares in the order of the ranks. Where `world` does not
    divide the batch, shares differ by one; places are cut between multiples of `together`."""
    groups, start = batch_size // together, step * batch_size
    first, end = (start + groups * r // world * together for r in (rank, rank + 1))
    return slice(first, end)


def check_rank(rank: int, world: int) -> None:
    """Raises InputError for a rank that is not from 0 to world - 1."""
    if world < 1 or not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}: ranks count from 0 to one below their number")


def check_share(batch_size: int, world: int, together: int = 1) -> None:
    """Raises InputError for batches of which `part` would give some rank nothing."""
    if batch_size // together < world:
        identities = f" ({batch_size // together} identities)" if together > 1 else ""
        raise InputError(
            f"batch size {batch_size}{identities} for {world} ranks, which each show a share of "
            f"every batch: give {world * together} or more, or take fewer ranks"
        )


@dataclass(frozen=True)
class RandomSampler:
    """Every one of `n` samples once, in random order."""

    n: int

    @property
    def places(self) -> int:
        return self.n

    def order(self, seed: int, epoch: int, device: torch.device | str = "cpu") -> Order:
        samples = torch.arange(self.n, device=device)
        return Order(permutation(draw(seed, epoch, samples, EPOCH)[0]), None)


@dataclass(frozen=True)
class RepeatedSampler:
    """Repeated augmentation (Hoffer et al. 2020): each sample `repeats` times side by side, each
    time augmented otherwise. An epoch is as long as the set, so it shows n / repeats of it; over
    `repeats` epochs every sample comes up once (a last few twice where `repeats` does not divide
    n). Raises InputError for repeats below 1 or above n.
    """

    n: int
    repeats: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= self.n:
            raise InputError(f"{self.repeats} repeats of {self.n} images: give 1 to {self.n}")

    @property
    def places(self) -> int:
        return self.n

    def order(self, seed: int, epoch: int, device: torch.device | str = "cpu") -> Order:
        # one random order for every `repeats` epochs, of which each takes its share
        cycle, turn = divmod(epoch, self.repeats)
        places = torch.arange(self.n, device=device)
        shuffled = permutation(draw(seed, cycle, places, GROUP)[0])
        share = -(-self.n // self.repeats)
        sample = shuffled[(turn * share + places // self.repeats) % self.n]
        return Order(sample, places % self.repeats)


@dataclass(frozen=True, eq=False)
class PKSampler:
    """Batches of P different identities with K images each (Hermans et al. 2017), P * K = the batch
    size. An epoch:

    - The images of each identity, shuffled, are cut into groups of K. A last incomplete group is
      filled up from the start of the identity's shuffled images; so an identity with fewer than K
      makes one group that shows its images several times, augmented differently. Every image is in
      some group.
    - An epoch has as many batches as P different identities each allow: the largest B for which
      sum(min(groups of an identity, B)) >= P * B. Only groups beyond that are left out.
    - An identity's groups are spread evenly over the epoch, from a random start. Batches take
      groups as they come, except that a second group of an identity waits for the next batch, and
      that an identity with as many groups left as there are batches left comes first.

    With `cameras`, groups take turns through an identity's cameras, so that one shows as many of
    them as it can. Raises InputError for p or k below 1, and for a p above the number of
    identities.
    """

    ids: Tensor  # (N,) int64
    p: int
    k: int
    cameras: Tensor | None = None  # (N,) int64
    steps: int = field(init=False)  # B
    _by_id: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.p < 1 or self.k < 1:
            raise InputError(f"{self.p} identities x {self.k} images: give at least 1 of each")
        _, label, count = torch.unique(self.ids, return_inverse=True, return_counts=True)
        if self.p > len(count):
            raise InputError(
                f"batches of {self.p} identities from {len(count)}: give {len(count)} or less"
            )
        groups = -(-count // self.k)
        steps = int(groups.sum()) // self.p
        while int(groups.clamp(max=steps).sum()) < self.p * steps:
            steps = int(groups.clamp(max=steps).sum()) // self.p
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "_by_id", (label, count, count.cumsum(0) - count))

    @property
    def places(self) -> int:
        return self.steps * self.p * self.k

    def order(self, seed: int, epoch: int, device: torch.device | str = "cpu") -> Order:
        label, count, first = self._by_id
        words = draw(seed, epoch, torch.arange(len(label)), GROUP)
        key = words[0]
        if self.cameras is not None:
            key = _place_among((label << 20) + self.cameras, words[0])
            key = (key << 32) + words[1]  # first of every camera, then the second of every camera
        of_id = torch.argsort(key, stable=True)
        of_id = of_id[torch.argsort(label[of_id], stable=True)]  # (N,) images by id, shuffled
        groups = -(-count // self.k)  # (ids,)
        owner = torch.repeat_interleave(torch.arange(len(count)), groups)  # (groups,)
        start = torch.repeat_interleave(groups.cumsum(0) - groups, groups)
        turn = torch.arange(len(owner)) - start  # of the group among its id's
        places = turn[:, None] * self.k + torch.arange(self.k)
        images = of_id[first[owner, None] + places % count[owner, None]]  # (groups, K)
        # ids, numbered after the samples, draw where in the epoch their groups lie
        phase = draw(seed, epoch, len(label) + torch.arange(len(count)), GROUP)[2]
        when = ((turn << 32) + phase[owner]).double() / groups[owner]
        queue = owner[torch.argsort(when, stable=True)]
        chosen = _different(queue.tolist(), groups.numpy(), self.p, self.steps)
        sample = images[torch.from_numpy(chosen)].view(-1)
        return Order(_to(sample, device), torch.arange(len(sample), device=device))


@dataclass(frozen=True, eq=False)
class MixedSampler:
    """Batches of which `unlabelled` of `batch_size` images have no label, spread evenly over each
    batch. An epoch has as many batches as the images of both kinds fill.

    Each kind is shown in an order of its own, a pass over all its images after the other, and goes
    on at the next epoch where it was: the fewer labelled images there are, the more often each is
    shown, augmented otherwise each time. Raises InputError where a kind is missing, or has no place
    in a batch.
    """

    labels: Tensor  # (N,) int64, IGNORED: without a label
    batch_size: int
    unlabelled: int  # images of a batch
    _kinds: tuple[Tensor, Tensor] = field(init=False, repr=False)  # labelled samples, and others

    def __post_init__(self) -> None:
        without = self.labels.cpu() == IGNORED
        kinds = (~without).nonzero()[:, 0], without.nonzero()[:, 0]
        if not 0 < self.unlabelled < self.batch_size:
            raise InputError(
                f"{self.unlabelled} unlabelled of {self.batch_size} images in a batch: give 1 to "
                f"{self.batch_size - 1}"
            )
        if not all(map(len, kinds)):
            raise InputError(
                f"{len(kinds[0])} images with and {len(kinds[1])} without a label: batches of both "
                "kinds need some of each"
            )
        object.__setattr__(self, "_kinds", kinds)

    @property
    def places(self) -> int:
        return len(self.labels)

    def order(self, seed: int, epoch: int, device: torch.device | str = "cpu") -> Order:
        steps, rows = self.places // self.batch_size, self.batch_size
        before = torch.arange(rows + 1) * (rows - self.unlabelled) // rows  # labelled rows above
        labelled = before[1:] > before[:-1]  # (batch_size,) whether a row is one
        sample = torch.empty(steps, rows, dtype=torch.int64, device=device)
        repetition = torch.empty_like(sample)
        for kind, own in zip(self._kinds, (labelled, ~labelled), strict=True):
            columns = _to(own.nonzero()[:, 0], device)
            shown, again = _passes(_to(kind, device), seed, epoch, steps * len(columns))
            sample.index_copy_(1, columns, shown.view(steps, -1))
            repetition.index_copy_(1, columns, again.view(steps, -1))
        return Order(sample.view(-1), repetition.view(-1))


def _passes(samples: Tensor, seed: int, epoch: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` samples (count,) of an epoch from pass after pass over all `samples` (n,), each
    in a random order of its own; and the number of the pass, from the epoch's first on."""
    n, start = len(samples), epoch * count
    first, last = start // n, (start + count - 1) // n
    number = torch.arange(first, last + 1, device=samples.device)[:, None]  # (passes, 1)
    words = draw(seed, number, samples[None], EPOCH)[0]  # (passes, n)
    order = samples[torch.argsort(words, dim=1, stable=True)].view(-1)
    place = torch.arange(count, device=samples.device) + start - first * n
    return order[place], place // n


def _to(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on the device; to a GPU from pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _place_among(group: Tensor, words: Tensor) -> Tensor:
    """The place (N,) of each element among those of its group, by their random words."""
    _, label, count = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.argsort(words, stable=True)
    order = order[torch.argsort(label[order], stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - (count.cumsum(0) - count)[label[order]]
    return place


def _different(queue: list[int], groups: np.ndarray, p: int, steps: int) -> np.ndarray:
    """`steps` batches of `p` groups of different owners, (steps * p,), in about the order of
    `queue`, which holds each owner as often as it has `groups`."""
    left, first = groups.copy(), groups.cumsum() - groups
    chosen: list[int] = []
    ahead = [0] * len(groups)  # groups taken before their turn in the queue
    waiting: list[int] = []
    rest = iter(queue)
    for steps_left in range(steps, 0, -1):
        # owners with as many groups left as there are batches left must be in every one of them
        batch = np.flatnonzero(left >= steps_left)
        batch = batch[np.argsort(-left[batch], kind="stable")][:p].tolist()
        seen = set(batch)
        for owner in batch:
            ahead[owner] += 1
        still = []
        for owner in waiting:
            if ahead[owner]:
                ahead[owner] -= 1
            elif owner in seen or len(batch) == p:
                still.append(owner)
            else:
                seen.add(owner)
                batch.append(owner)
        waiting = still
        while len(batch) < p:  # there are enough: that is what `steps` was chosen for
            owner = next(rest)
            if ahead[owner]:
                ahead[owner] -= 1
            elif owner in seen:
                waiting.append(owner)
            else:
                seen.add(owner)
                batch.append(owner)
        chosen += [int(first[owner] + groups[owner] - left[owner]) for owner in batch]
        left[batch] -= 1
    return np.array(chosen, np.int64)
