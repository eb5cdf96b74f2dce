"""The base of all loaders: arguments, steps of an epoch, and the samples and random choices of a
step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdml.data import augment
from fastdml.data.augment import Choices
from fastdml.data.image_files import ImageFiles
from fastdml.data.image_set import IGNORED, ImageSet
from fastdml.data.philox import check_seed
from fastdml.data.reid_split import ReidSplit
from fastdml.data.samplers import Order, RandomSampler, Sampler, check_rank, check_share, part
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.image_record import Resize


Files = ReidSplit | ImageFiles


class Batching:
    """In training the order is the sampler's, a last short batch is dropped, and each rank shows
    its share of every batch. In evaluation the order is the set's and the last batch may be short;
    every rank sees all of it. `ResidentLoader` says what the arguments mean. `paths` are the files
    in the order of `labels`, None for an `ImageSet`.
    """

    stored: tuple[int, int]  # (height, width) that files are decoded to, or that images have

    def __init__(
        self,
        images: ImageSet | Files,
        batch_size: int,
        *,
        stored: tuple[int, int] | None = None,
        seed: int = 0,
        train: bool,
        size: tuple[int, int] | None = None,
        pad: int = 4,
        padding: str = "reflect",
        flip: bool = True,
        erase: float = 0.0,
        cutout: int = 0,
        sampler: Sampler | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: give at least 1")
        check_rank(rank, world)
        self.n, self.batch_size, self.train = len(images), batch_size, train
        self.seed = check_seed(seed)
        self.rank, self.world = (rank, world) if train else (0, 1)
        self.sampler: Sampler | None = None
        self._steps = -(-self.n // batch_size)
        self._together = getattr(sampler, "k", 1)  # images of an identity, on one rank
        if train:
            self.sampler = sampler or RandomSampler(self.n)
            self._steps = self._count(self.sampler)
        self.paths: tuple[str, ...] | None = None
        self.files = getattr(images, "files", ())  # that images in memory were read from
        self.resize: Resize | None = None
        if isinstance(images, ImageSet):
            _, height, width, _ = images.pixels.shape
            self.stored = height, width
        else:
            self.paths, self.resize = images.paths, images.resize
            self.stored = stored or images.size
        self.augment = augment.options(
            self.stored, train, size=size, pad=pad, padding=padding, flip=flip, erase=erase,
            cutout=cutout,
        )  # fmt: skip
        self.device, self.dtype, self.channels_last = torch.device(device), dtype, channels_last
        self.num_classes, self.class_names = images.num_classes, images.class_names
        self.mean, self.std = images.mean, images.std
        self.labels = images.labels.to(self.device)  # (N,)
        self.unlabelled = int((images.labels == IGNORED).sum())  # images without a label
        self._kept: tuple[int, Order] | None = None  # an epoch and its order
        self._chosen: tuple[int, Choices] | None = None  # an epoch and its choices
        self._take_in(images)

    def _take_in(self, images: Any) -> None:
        """Prepares the images once, in a loader's constructor."""
        raise NotImplementedError

    def _count(self, sampler: Sampler) -> int:
        """The steps of an epoch of training."""
        own = getattr(sampler, "batch_size", self.batch_size)
        if own != self.batch_size:
            raise InputError(f"batch size {self.batch_size} for a sampler of {own}")
        p, k = getattr(sampler, "p", 1), getattr(sampler, "k", 1)
        if p * k > 1 and self.batch_size != p * k:
            raise InputError(
                f"batch size {self.batch_size} for {p} identities x {k} images: give {p * k}"
            )
        check_share(self.batch_size, self.world, self._together)
        places = sampler.places
        steps = places // self.batch_size
        if steps == 0:
            raise InputError(
                f"batch size {self.batch_size} is larger than the {places} training images: "
                f"give {places} or less, or more images"
            )
        return steps

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Order:
        """The order of an epoch for all ranks; kept until another epoch is asked for."""
        epoch = epoch if self.train else 0
        if self._kept is None or self._kept[0] != epoch:
            if self.sampler is None:
                order = Order(torch.arange(self.n, device=device), None)
            else:
                order = self.sampler.order(self.seed, epoch, device)
            self._kept = epoch, order
        return self._kept[1]

    def choices(self, epoch: int, device: torch.device | str = "cpu") -> Choices:
        """The random choices of a whole epoch: drawn batch by batch they would cost more than the
        batch."""
        if self._chosen is None or self._chosen[0] != epoch:
            order = self.order(epoch, device)
            chosen = augment.choose(self.augment, self.seed, epoch, order.sample, order.repetition)
            self._chosen = epoch, chosen
        return self._chosen[1]

    def __len__(self) -> int:
        return self._steps

    def part(self, epoch: int, step: int) -> slice:
        """The places of the epoch's order that this rank shows at a step."""
        if epoch < 0 or not 0 <= step < self._steps:
            raise IndexError(
                f"epoch {epoch}, step {step}: an epoch has steps 0 to {self._steps - 1}"
            )
        return part(step, self.batch_size, self.rank, self.world, self._together)

    @property
    def rows(self) -> int:
        """The most images that this rank shows at a step: its share of the batch."""
        share = part(0, self.batch_size, self.rank, self.world, self._together)
        return share.stop - share.start

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on, or of these each `every`-th."""
        raise NotImplementedError

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """One batch by itself, without prefetching: for looking at it."""
        return next(iter(self.epoch(epoch, step)))

    def samples(self, epoch: int, step: int) -> Tensor:
        """Which images of the set the batch shows, (B,) int64 on the device, in its order."""
        return self.order(epoch).sample[self.part(epoch, step)].to(self.device)

    def _finished(self, epoch: int, step: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """A streamed batch (B, H, W, ch) on the device, in the form that was asked for."""
        return self._batch(images, self.samples(epoch, step))

    def _batch(self, pixels: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, ch) as images (B, ch, H, W), without a copy where channels_last; and labels."""
        images = pixels.to(self.dtype).permute(0, 3, 1, 2)
        return (images if self.channels_last else images.contiguous()), self.labels[samples]
