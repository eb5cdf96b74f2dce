"""Batches of the caller's own labelled and unlabelled data, for semi-supervised training.

Of two pairs of arrays, or two data sets of torch, every batch is drawn from both, as `MixedSampler`
says, and a run resumes exactly. Of other sources, such as DataLoaders, each batch is one of the
labelled followed by one of the unlabelled source: how many rows are of which kind is theirs to say,
an epoch is a pass over the labelled source, and the other goes round and round beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdml.data.image_set import IGNORED
from fastdml.data.loaders.batching import Batching
from fastdml.data.samplers import MixedSampler
from fastdml.errors import InputError
from fastdml.train.batches import (
    Batches,
    CheckLabels,
    IterableBatches,
    as_batches,
    check_size,
    checked_arrays,
    checked_inputs,
    sizes,
)
from fastdml.train.own_batches import (
    ArrayBatches,
    dataset_loader,
    is_array,
    is_arrays,
    is_dataset,
)


def with_unlabelled(
    train: Any,
    unlabelled: Any,
    device: torch.device,
    num_classes: int,
    check: CheckLabels,
    *,
    batch_size: int,
    rows: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Batches of `train`, as `fit` takes it, and of `unlabelled`: an array of inputs, a data set or
    batches of inputs, or any of these with labels, which are not looked at. rows: of a batch of
    `batch_size`, those without a label. rank, world: as of `as_batches`. Raises InputError for
    sources that give no batches, and for inputs that do not fit each other."""
    alone = unlabelled[0] if is_arrays(unlabelled) else unlabelled
    share: dict[str, Any] = {"rank": rank, "world": world}
    if is_arrays(train) and is_array(alone):
        inputs, labels = checked_arrays(train, num_classes, "training", check)
        more = checked_inputs(alone, "unlabelled data")
        _check_alike(inputs, more)
        inputs = torch.cat([inputs, more.to(inputs.dtype)])
        labels = torch.cat([labels, labels.new_full((len(more),), IGNORED)])
        check_size(len(labels), batch_size, seed, "training")
        mixed = MixedSampler(labels, batch_size, rows)
        tensors = inputs.to(device), labels.to(device)
        return ArrayBatches(*tensors, batch_size, seed, mixed, **share)
    if is_dataset(train) and is_dataset(alone):
        both = Both(train, alone)
        check_size(len(both), batch_size, seed, "training")
        mixed = MixedSampler(both.kinds, batch_size, rows)
        loader = dataset_loader(both, batch_size, seed, mixed, **share)
        return IterableBatches(loader, device, num_classes, "training", check)
    labelled = as_batches(
        *(train, device, num_classes, "training", check),
        batch_size=batch_size - rows,
        seed=seed,
        **share,
    )
    return PairedBatches(labelled, _inputs_alone(alone, device, num_classes, rows, seed, **share))


def _check_alike(labelled: Tensor, unlabelled: Tensor) -> None:
    if labelled.shape[1:] != unlabelled.shape[1:]:
        raise InputError(
            f"the unlabelled inputs are {sizes(unlabelled.shape[1:])} and the labelled ones "
            f"{sizes(labelled.shape[1:])}: bring them to one shape"
        )


def _inputs_alone(
    source: Any,
    device: torch.device,
    num_classes: int,
    rows: int,
    seed: int,
    rank: int,
    world: int,
) -> Batches:
    """Batches whose labels are all IGNORED."""
    share: dict[str, Any] = {"rank": rank, "world": world}
    what = "unlabelled"
    if is_array(source):
        inputs = checked_inputs(source, f"{what} data")
        check_size(len(inputs), rows, seed, what)
        labels = torch.full((len(inputs),), IGNORED, device=device)
        return ArrayBatches(inputs.to(device), labels, rows, seed, **share)
    if is_dataset(source):
        source = WithoutLabels(source)
    elif hasattr(source, "__iter__") and not callable(getattr(source, "epoch", None)):
        source = InputsAlone(source)
    return as_batches(source, device, num_classes, what, batch_size=rows, seed=seed, **share)


def _input(item: Any) -> Any:
    """The input of a sample or a batch, of (input, label) the first."""
    return item[0] if isinstance(item, (tuple, list)) and len(item) in (1, 2) else item


class WithoutLabels(Dataset[Any]):
    """The samples of another data set, (input, IGNORED)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return _input(self.dataset[i]), IGNORED


class Both(Dataset[Any]):
    """The samples of a labelled data set, `dataset`, followed by those of another, whose label is
    IGNORED. kinds: (N,) IGNORED for those, else 0."""

    def __init__(self, labelled: Any, unlabelled: Any) -> None:
        self.dataset, self.others = labelled, WithoutLabels(unlabelled)
        self.kinds = torch.zeros(len(self), dtype=torch.int64)
        self.kinds[len(labelled) :] = IGNORED

    def __len__(self) -> int:
        return len(self.dataset) + len(self.others)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i >= len(self.dataset):
            return self.others[i - len(self.dataset)]
        item = self.dataset[i]
        try:
            x, label = item
            return x, operator.index(label)
        except (TypeError, ValueError):
            raise InputError(
                f"training sample {i}: data sets beside unlabelled ones give pairs (input, class "
                f"index), not {type(item).__name__}s of other things"
            ) from None


class InputsAlone:
    """Another iterable's batches of inputs, or of (inputs, labels), with IGNORED as all labels."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.batch_size = getattr(source, "batch_size", None)
        self.sampler = getattr(source, "sampler", None)
        self.batch_sampler = getattr(source, "batch_sampler", None)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            inputs = _input(batch)
            count = len(inputs) if isinstance(inputs, Tensor) and inputs.dim() else 0
            yield inputs, torch.full((count,), IGNORED)


class PairedBatches:
    """Each batch of `labelled` with the next of `unlabelled`, which goes on over epochs where it
    was. An epoch is one of `labelled`. Of several ranks each shows its share of either."""

    def __init__(self, labelled: Batches, others: Batches) -> None:
        self.labelled, self.others = labelled, others
        self.batch_size = labelled.batch_size + others.batch_size  # 0 where a loader tells none
        self._next: tuple[int, Iterator[Any]] | None = None  # a place among the others, and they

    def __len__(self) -> int:
        return len(self.labelled)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        place = epoch * len(self) + start
        if self._next is None or self._next[0] != place:
            self._next = place, self._from(place)
        others = self._next[1]
        for inputs, labels in self.labelled.epoch(epoch, start):
            more, _ = next(others)
            _check_alike(inputs, more)
            self.batch_size = self.batch_size or len(inputs) + len(more)
            place += 1
            self._next = place, others
            yield (
                torch.cat([inputs, more.to(inputs.dtype)]),
                torch.cat([labels, labels.new_full((len(more),), IGNORED)]),
            )

    def _from(self, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = divmod(place, len(self.others))
        while True:
            yield from self.others.epoch(epoch, start)
            epoch, start = epoch + 1, 0


def learns_without_labels(source: Any) -> bool:
    """Whether batches hold rows without a label that shall teach all the same."""
    if isinstance(source, Batching):
        return source.unlabelled > 0
    dataset = getattr(getattr(source, "source", None), "dataset", None)  # of a DataLoader
    mixed = isinstance(getattr(source, "sampler", None), MixedSampler)  # of arrays
    return mixed or isinstance(source, PairedBatches) or isinstance(dataset, Both)


def image_counts(source: Any) -> dict[str, int] | None:
    """How many training samples have a label, and how many have none; None where that is not
    known."""
    labels = getattr(source, "labels", None)
    if isinstance(dataset := getattr(getattr(source, "source", None), "dataset", None), Both):
        labels = dataset.kinds
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        return None
    without = int((labels == IGNORED).sum())
    return {"labelled": len(labels) - without, "unlabelled": without}
