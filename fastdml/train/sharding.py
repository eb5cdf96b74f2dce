"""Which of a user's batches the ranks of a mesh may train on: those that give each column its
share, and all rows of a column the same.

fastdml's loaders, arrays and data sets of torch are cut by fastdml. A DataLoader cuts by itself, by
a sampler with `num_replicas` and `rank` as torch's DistributedSampler has them; other batches say
by attributes `rank` and `world` which share they are. That rows see the same is compared while
training goes on, by a sum over labels and some values of the inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdml.data.loaders.batching import Batching
from fastdml.errors import InputError
from fastdml.train.own_batches import ArrayBatches

if TYPE_CHECKING:
    from fastdml.parallel import Mesh
    from fastdml.train.batches import Batches

FACTOR = 6364136223846793005  # odd, so that multiplying by it loses nothing modulo 2**64
SOME = 16  # values of an input that are looked at
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def check_shares(source: Any, what: str, rank: int, world: int) -> None:
    """Refuses batches of which not each of `world` columns gets its share. what: "training" or
    "unlabelled", for messages."""
    if isinstance(source, Batching):
        if (source.rank, source.world) != (rank, world):
            raise InputError(
                f"the {what} loader shows the share of rank {source.rank} of {source.world}, and "
                f"this is column {rank} of {world}: make it with rank={rank}, world={world} (of a "
                "mesh: mesh.column and mesh.data)"
            )
        return
    if world == 1:
        return
    sampler = sharding_sampler(source)
    if sampler is not None:
        found = sampler.rank, sampler.num_replicas
    elif callable(getattr(source, "epoch", None)):
        found = getattr(source, "rank", 0), getattr(source, "world", 1)
    else:
        found = 0, 1
    if found == (rank, world):
        return
    kind = type(getattr(source, "source", source)).__name__  # of `InputsAlone` the user's own
    if found == (0, 1):
        has = f"a {kind} gives each of the {world} columns of the mesh the same batches"
    else:
        has = f"the {kind} gives this column, {rank} of {world}, the share {found[0]} of {found[1]}"
    remedy = "DistributedSampler(data, num_replicas=mesh.data, rank=mesh.column)"
    if callable(getattr(source, "epoch", None)):
        remedy = (
            "attributes rank (mesh.column) and world (mesh.data), and batches that are that share"
        )
    raise InputError(
        f"{what} data: {has}: give it {remedy}, or give the data set or the arrays themselves"
    )


def sharding_sampler(source: Any) -> Any:
    """What divides the samples of a DataLoader among ranks; None where nothing does."""
    batches = getattr(source, "batch_sampler", None)
    for sampler in (getattr(source, "sampler", None), batches, getattr(batches, "sampler", None)):
        if hasattr(sampler, "num_replicas") and hasattr(sampler, "rank"):
            return sampler
    return None


class BatchSum:
    """A sum over tensors of batches that knows their order; never waits for their device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # () int64, modulo 2**64

    def add(self, values: Tensor) -> None:
        """Whole numbers (...), such as the labels of the next batch."""
        flat = values.detach().flatten().to(torch.int64)
        places = torch.arange(1, len(flat) + 1, device=flat.device)
        batch = (flat * (2 * places + 1) + places).sum()
        self.total = batch if self.total is None else self.total * FACTOR + batch

    def value(self) -> int:
        return 0 if self.total is None else int(self.total)


class SeenBatches:
    """A sum over the labels, and some values of each input, of all batches of a training, of which
    the rows of a column must have seen the same. Of batches that are functions of the seed and the
    step, which fastdml makes, and without a second row nothing is done."""

    def __init__(self, mesh: Mesh | None, train: Any) -> None:
        self.mesh, self.seen = mesh, BatchSum()
        self.needed = mesh is not None and mesh.peer > 1 and not _by_seed(train)

    def add(self, *batch: Tensor) -> None:
        """The next batch as a step takes it: inputs (N, ...) and labels (N, ...) first, unless it
        is the index of a loader of fastdml, at which nobody looks."""
        if self.needed:
            for values in batch[:2]:
                self.seen.add(_bits(values))

    def check(self) -> None:
        """Refuses rows of one column that saw other batches; all ranks call it."""
        if not self.needed or self.mesh is None:
            return
        found, columns = self.mesh.gather(self.seen.value()), self.mesh.data
        for column in range(columns):
            if len({*found[column::columns]}) > 1:
                raise InputError(
                    f"the rows of column {column} of the mesh have trained on other batches than "
                    "each other: a DataLoader must shuffle and augment by the same generators on "
                    "all of them, and its sampler cut by mesh.data and mesh.column, not by the "
                    "number of ranks"
                )


class Turn(NamedTuple):
    """A batch that a column evaluates."""

    start: int  # the number of rows in the batches before
    images: Tensor
    labels: Tensor
    counts: bool  # whether it is a batch of the column's own


class Dealt:
    """The batches of `test` that a column of the mesh evaluates: whole ones, in turn, so that each
    is evaluated as in one process. Columns with one fewer than others get one more, which does not
    count: where a peer is cut over columns, all must call it equally often.

    Batches whose `epoch` takes `every`, as fastdml's own do, are read where they are needed; of
    others each rank reads all, and `check` compares their labels."""

    def __init__(self, test: Batches, mesh: Mesh | None) -> None:
        self.test, self.mesh = test, mesh
        self.column, self.columns = (mesh.column, mesh.data) if mesh else (0, 1)
        self.seen = BatchSum()
        self.steps = 0  # of an epoch; known after one
        self.compared = mesh is not None and not _by_seed(test)

    def __iter__(self) -> Iterator[Turn]:
        if self.columns > 1 and "every" in inspect.signature(self.test.epoch).parameters:
            return self._read_own()
        return self._read_all()

    def _read_own(self) -> Iterator[Turn]:
        test, self.steps = self.test, len(self.test)
        steps = range(self.column, self.steps, self.columns)
        batches = test.epoch(0, self.column, self.columns)  # type: ignore[call-arg]
        for step, (images, labels) in zip(steps, batches, strict=True):
            yield Turn(step * test.batch_size, images, labels, True)
        if len(steps) < -(-self.steps // self.columns):
            yield Turn(0, *next(iter(test.epoch(0))), False)

    def _read_all(self) -> Iterator[Turn]:
        self.seen, self.steps, start = BatchSum(), 0, 0
        for step, (images, labels) in enumerate(self.test.epoch(0)):
            self.steps = step + 1
            if self.compared:
                self.seen.add(_bits(labels))
            if step % self.columns == self.column:
                yield Turn(start, images, labels, True)
            start += len(labels)
        if 0 < self.steps % self.columns <= self.column:
            yield Turn(0, images, labels, False)

    def check(self) -> None:
        """Refuses batches that ranks read in another order; all ranks call it after an epoch."""
        if self.compared and self.mesh is not None:
            found = self.mesh.gather(self.seen.value())
            if len({*found}) > 1:
                raise InputError(
                    "the batches to score on differ between the ranks: give a DataLoader that does "
                    "not shuffle or shard, or the data set or the arrays themselves"
                )


def _bits(values: Tensor) -> Tensor:
    """Some values of each of N, as whole numbers: (N, at most SOME)."""
    flat = values.detach().flatten(1) if values.dim() > 1 else values.detach()[:, None]
    some = flat[:, :: max(1, -(-flat.shape[1] // SOME))].contiguous()
    return some.view(WHOLE[some.element_size()])


def _by_seed(train: Any) -> bool:
    """Whether the batches are functions of the seed and the step."""
    parts = [getattr(train, name, None) for name in ("labelled", "others")]
    if None not in parts:
        return all(map(_by_seed, parts))
    return isinstance(train, (Batching, ArrayBatches))
