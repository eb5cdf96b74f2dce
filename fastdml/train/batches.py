"""The interface of a source of batches, and the adapter for iterables such as a DataLoader.

Batches are pairs of tensors on one device: inputs (N, ...), which may be images (N, channels, H, W)
of floats, rows (N, F) of floats, or integers such as token ids (N, L); and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdml.data.image_files import ImageFiles
from fastdml.data.image_set import IGNORED, ImageSet
from fastdml.errors import InputError
from fastdml.train.own_batches import (
    ArrayBatches,
    EpochBatches,
    as_tensor,
    dataset_loader,
    is_arrays,
    is_dataset,
)
from fastdml.train.sharding import check_shares, sharding_sampler

# (labels, images, num_classes, where, values): refuses labels that cannot be learnt. where: which
# batch, for messages. values: whether to read the labels, which waits for their device.
CheckLabels = Callable[[Tensor, Tensor, int, str, bool], None]


class Batches(Protocol):
    """`epoch(e, start)` gives the batches of epoch e from step `start` on, on the device.

    A run resumes exactly within an epoch if the batches of an epoch are the same each time, as
    those of `data.ResidentLoader` are.

    A source may also offer `index(e, step)`, small tensors on the device, and `assemble(*index)`,
    which makes the batch from them and does nothing else: on CUDA the step then assembles its batch
    itself, as part of its graph where it has one. `mean`, `std`, `class_names` and `resize`, if it
    has them, are recorded with the weights as `Cohort` describes them.
    """

    batch_size: int

    def __len__(self) -> int: ...  # steps an epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class IterableBatches:
    """Batches from any sized iterable of (inputs, labels), checked and moved to the device.

    Resuming within an epoch reads and drops the batches already done; that is exact where the order
    depends on the epoch alone (a sampler with `set_epoch`, or no shuffling). Checking labels that
    are on the host takes microseconds a batch; images are looked at where the device is a CPU, and
    of others the first batch alone.
    """

    def __init__(
        self,
        source: Any,
        device: torch.device,
        num_classes: int,
        what: str = "training",
        check: CheckLabels | None = None,
        *,
        world: int = 1,
    ) -> None:
        self.source, self.device, self.num_classes, self.what = source, device, num_classes, what
        self.check, self.world = check or check_labels, world
        own = getattr(source, "batch_sampler", None)
        self.batch_size = (getattr(source, "batch_size", None) or 0) * world  # of all ranks
        if isinstance(own, EpochBatches):
            self.batch_size = own.batch_size
        self.shape: tuple[int, ...] | None = None  # of the first image

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        drawn = torch.get_rng_state()
        batches = iter(self.source)
        for _ in range(start):
            next(batches, None)
        if start:  # reading batches again must not advance the generators that the peers use
            torch.set_rng_state(drawn)
        step = start - 1
        for step, batch in enumerate(batches, start):
            inputs, labels = self._checked(batch, step)
            layout = torch.channels_last if inputs.dim() == 4 else torch.preserve_format
            inputs = inputs.to(self.device, non_blocking=True, memory_format=layout)
            yield inputs, labels.to(self.device, non_blocking=True)
        if step + 1 < len(self):
            raise InputError(
                f"the {self.what} batches ended after {step + 1} of the {len(self)} that their "
                "length promises: give a length that is right"
            )

    def _samplers(self) -> list[Any]:
        """Those of a DataLoader that are told the epoch."""
        batches = getattr(self.source, "batch_sampler", None)
        told = [getattr(self.source, "sampler", None)]
        if isinstance(batches, EpochBatches):
            told.append(batches)
        if self.world > 1:
            shards = sharding_sampler(self.source)
            told += [shards] if shards is not told[0] else []
        return told

    def _checked(self, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        where = f"{self.what} batch {step}"
        inputs, labels = check_batch(batch, where)
        if inputs.requires_grad:  # such as features of a network
            inputs = inputs.detach()
        first = self.shape is None
        shape = self.shape or tuple(inputs.shape[1:])
        if inputs.shape[1:] != shape and inputs.is_floating_point():  # sequences vary in length
            what = noun(inputs)
            remedy = "resize all images to one size" if what == "image" else "give all one shape"
            raise InputError(
                f"{where} holds {what}s of {sizes(inputs.shape[1:])}, the first one of "
                f"{sizes(shape)}: {remedy}"
            )
        self.shape, self.batch_size = shape, self.batch_size or len(inputs) * self.world
        values = first or labels.device.type == "cpu"
        self.check(labels, inputs, self.num_classes, where, values)
        if first or self.device.type == "cpu" == inputs.device.type:
            check_finite(inputs, where)
        return inputs, labels


def check_batch(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """Inputs (N, ...) and labels; reads no value."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            found = f"a dict of {', '.join(map(repr, batch))}"
        elif isinstance(batch, (tuple, list)):
            found = f"{len(batch)} things"
        raise InputError(
            f"{where} is {found}: batches must be pairs (inputs, labels) of two tensors; "
            "choose these in the data set or the loader's collate_fn"
        )
    inputs, labels = batch
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{where}: {name} are a {type(value).__name__}, not a tensor: convert them, for "
                "instance by the loader's collate_fn"
            )
    check_inputs(inputs, where)
    return inputs, labels


def check_inputs(inputs: Tensor, where: str) -> None:
    """Refuses inputs that are not (N, ...), and images that are not floats."""
    if inputs.dim() < 2 or not len(inputs):
        raise InputError(
            f"{where}: inputs are of shape {tuple(inputs.shape)}: give (N, channels, H, W), (N, "
            "features) or another with N, the number of samples, first"
        )
    if inputs.dim() == 4 and not inputs.is_floating_point():
        raise InputError(
            f"{where}: images are {_dtype(inputs)}: normalise them to floats, at the least by "
            "images.float() / 255"
        )


def noun(inputs: Tensor) -> str:
    """What messages call one of these inputs."""
    return "image" if inputs.dim() == 4 else "input"


def check_labels(
    labels: Tensor, images: Tensor, num_classes: int, where: str, values: bool = True
) -> None:
    """Refuses labels that are not class indices (N,), int64 or int32; with `values` also labels out
    of range, which waits for the device."""
    if labels.shape != images.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{where}: labels are {_dtype(labels)} of shape {tuple(labels.shape)} for "
            f"{len(images)} {noun(images)}s: give class indices ({len(images)},), int64"
            f"{_to_indices(labels, len(images))}"
        )
    if not values:
        return
    low, high = (int(v) for v in labels.aminmax())
    if low >= 0 and high < num_classes:
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != IGNORED)]
    if len(wrong):
        raise InputError(
            f"{where}: label {int(wrong[0])} is no class: with {num_classes} classes labels are "
            f"0 to {num_classes - 1} (rows without a label: {IGNORED})"
        )


def _to_indices(labels: Tensor, n: int) -> str:
    """What makes class indices (n,) of these labels, in brackets, if it can be told."""
    remedy = ""
    if labels.dim() == 2 and len(labels) == n:
        one_hot = labels.shape[1] > 1
        remedy = "labels.argmax(1) makes them of one-hot rows" if one_hot else "labels[:, 0]"
    elif labels.shape == (n,):
        remedy = "labels.long()"
    return remedy and f" ({remedy})"


def check_finite(images: Tensor, where: str) -> None:
    """Refuses NaN and infinities; waits for the device where the images are on one."""
    if not images.is_floating_point():
        return
    if images.sum(dtype=torch.float32).isfinite():  # a NaN or an infinity makes the sum one
        return
    bad = (~images.isfinite()).flatten(1).any(1).nonzero()[:, 0]
    if len(bad):
        raise InputError(
            f"{where}: {noun(images)} {int(bad[0])} ({len(bad)} of {len(images)} {noun(images)}s) "
            "has values that are NaN or infinite: look at the data and its normalisation (a std of "
            "0?)"
        )


def first_batch(
    source: Batches,
    num_classes: int,
    what: str = "training",
    check: CheckLabels = check_labels,
) -> tuple[Tensor, Tensor]:
    """The first batch of a source, checked in full."""
    batch = next(iter(source.epoch(0)))
    if not isinstance(source, IterableBatches):  # which checks its batches itself
        where = f"{what} batch 0"
        images, labels = check_batch(batch, where)
        check(labels, images, num_classes, where, True)
        check_finite(images, where)
    return batch


def assembler(source: Batches, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`source.assemble` if the step is to make its batches itself, else None."""
    return getattr(source, "assemble", None) if device.type == "cuda" else None


def as_batches(
    source: Any,
    device: torch.device,
    num_classes: int,
    what: str = "training",
    check: CheckLabels | None = None,
    *,
    batch_size: int = 500,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """`source` as `Batches`. what: "training", "validation" or "test", for messages. check: of the
    labels, by default that they are class indices. batch_size, seed: of arrays and data sets, which
    are no batches yet, see `own_batches`. rank, world: of training, which share of every batch is
    wanted; batches that are no such share are refused. Raises InputError for no source of batches,
    or an empty one."""
    batches: Batches
    if callable(getattr(source, "epoch", None)):
        check_shares(source, what, rank, world)
        batches = source
    elif is_arrays(source):
        inputs, labels = checked_arrays(source, num_classes, what, check or check_labels)
        check_size(len(labels), batch_size, seed, what)
        tensors = inputs.to(device), labels.to(device)
        batches = ArrayBatches(*tensors, batch_size, seed, rank=rank, world=world)
    elif is_dataset(source):
        check_size(len(source), batch_size, seed, what)
        loader = dataset_loader(source, batch_size, seed, rank=rank, world=world)
        batches = IterableBatches(loader, device, num_classes, what, check)
    elif hasattr(source, "__iter__") and _length(source) is not None:
        check_shares(source, what, rank, world)
        batches = IterableBatches(source, device, num_classes, what, check, world=world)
    elif isinstance(source, (ImageSet, ImageFiles)):
        train = what == "training"
        raise InputError(
            f"{what} data: an {type(source).__name__} is not batches yet: "
            f"fastdml.data.make_loader('auto', images, batch_size, train={train}) makes some"
        )
    else:
        raise InputError(
            f"{what} data: a {type(source).__name__} is not batches with a length, such as a "
            "DataLoader of a data set with one, nor a data set of torch, nor a pair of arrays "
            "(inputs, labels)"
        )
    classes = getattr(source, "num_classes", None)
    if isinstance(classes, int) and classes > num_classes:
        raise InputError(
            f"the {what} data have {classes} classes and the peers {num_classes}: build the "
            f"cohort with num_classes={classes}"
        )
    if len(batches) == 0:
        raise InputError(
            f"there is not one {what} batch: fewer images than the batch size, or no images?"
        )
    return batches


def checked_arrays(
    source: Any, num_classes: int, what: str, check: CheckLabels
) -> tuple[Tensor, Tensor]:
    """A pair of arrays as tensors, looked at in full."""
    where = f"{what} data"
    inputs, labels = (as_tensor(values, where) for values in source)
    check_inputs(inputs, where)
    check(labels, inputs, num_classes, where, True)
    check_finite(inputs, where)
    return inputs, labels


def checked_inputs(values: Any, where: str) -> Tensor:
    """An array of inputs as a tensor, looked at in full."""
    inputs = as_tensor(values, where)
    check_inputs(inputs, where)
    check_finite(inputs, where)
    return inputs


def check_size(n: int, batch_size: int, seed: int | None, what: str) -> None:
    """Refuses data that make no batch."""
    if n == 0 or (seed is not None and n < batch_size):
        raise InputError(
            f"there is not one {what} batch: batch_size is {batch_size} and there are {n} samples"
        )


def described(source: Any, channels: int) -> dict[str, Any]:
    """Those of `mean`, `std`, `classes`, `resize` and `stored`, as `Cohort` has them, that the
    source of batches tells.

    Of a DataLoader the data set's `classes` are taken, as torchvision's sets have them, and mean
    and std of a Normalize after a ToTensor, or ToDtype(scale=True), among its transforms.
    """
    found: dict[str, Any]
    source = getattr(source, "labelled", source)  # of two sources that of the labels
    if not isinstance(source, IterableBatches):
        names = {"mean": "mean", "std": "std", "classes": "class_names"}
        found = {name: getattr(source, theirs, None) for name, theirs in names.items()}
    else:
        data: Any = getattr(source.source, "dataset", None)
        while hasattr(data, "dataset"):  # torch's Subset
            data = data.dataset
        found = {**_normalisation(getattr(data, "transform", None))}
        if getattr(data, "target_transform", None) is None:  # which may change their order
            found["classes"] = getattr(data, "classes", None)
    plain: dict[str, Any] = {}
    for name, value in found.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (list, tuple)):
            one_for_all = name != "classes" and len(value) == 1
            plain[name] = [*value] * (channels if one_for_all else 1)
    if isinstance(resize := getattr(source, "resize", None), str):
        plain["resize"] = resize
    if resize == "stretch":
        plain["stored"] = list(source.stored)
    return plain


def _normalisation(transform: Any) -> dict[str, list[float]]:
    """mean and std in units of bytes, if it is certain that the pixels were bytes."""
    steps = getattr(transform, "transforms", None)
    if not isinstance(steps, Sequence):
        return {}
    kinds = [type(step).__name__ for step in steps]
    if kinds.count("Normalize") != 1:
        return {}
    at = kinds.index("Normalize")
    scaled = [
        kind == "ToTensor" or (kind == "ToDtype" and getattr(step, "scale", False) is True)
        for kind, step in zip(kinds[:at], steps, strict=False)
    ]
    if sum(scaled) != 1 or not scaled[-1]:  # something between them may change the scale
        return {}
    return {
        name: [255.0 * float(value) for value in getattr(steps[at], name)]
        for name in ("mean", "std")
    }


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # no length, as of a DataLoader over a stream
        return None


def sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
