"""A labelled set of images, whole in memory as uint8 and checked on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastdml.data.philox import SUBSET, check_seed, draw, permutation, rank_in_class
from fastdml.errors import InputError

IGNORED = -100  # the label of images without one, as in torch's cross-entropy


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels. Raises InputError for shapes, types and values that do not fit.

    In memory the channels of a pixel lie side by side (channels_last), as loaders read them; images
    of another memory format are accepted, and cost a loader a copy.
    """

    images: Tensor = field(repr=False)  # (N, ch, H, W) uint8
    labels: Tensor = field(repr=False)  # (N,) int64, each in [0, num_classes) or IGNORED
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # (ch,) in the units of the stored bytes
    std: tuple[float, ...]  # (ch,)
    white: int = 255  # the value of full brightness among the stored bytes
    files: tuple[str, ...] = field(default=(), repr=False)  # that the last images were read from

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(
                f"images are {tuple(images.shape)} {images.dtype}: give (N, channels, H, W) uint8"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(
                f"labels are {tuple(labels.shape)} {labels.dtype} for {len(images)} images: "
                f"give ({len(images)},) int64"
            )
        if len(self.class_names) != self.num_classes:
            raise InputError(
                f"{len(self.class_names)} class names for {self.num_classes} classes: give one each"
            )
        channels = images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise InputError(
                f"mean {self.mean} and std {self.std} for {channels} channels: "
                "give one of each a channel, std above zero"
            )
        if len(labels) == 0:
            raise InputError("the set holds no images: give at least one")
        low, high = (int(v) for v in labels.aminmax())
        if low == IGNORED:
            low = int(labels.masked_fill(labels == IGNORED, 0).min())
        if low < 0 or high >= self.num_classes:
            raise InputError(
                f"labels run from {low} to {high}: with {self.num_classes} classes they must be "
                f"from 0 to {self.num_classes - 1} (images without a label: {IGNORED})"
            )

    @classmethod
    def from_pixels(
        cls,
        pixels: Tensor,  # (N, H, W, ch) uint8
        labels: Tensor,  # (N,) int64
        class_names: tuple[str, ...],
        mean: tuple[float, ...],  # (ch,)
        std: tuple[float, ...],  # (ch,)
        white: int = 255,
    ) -> ImageSet:
        """A set of these pixels, in the order in which files hold them; they are not copied."""
        images = pixels.permute(0, 3, 1, 2)
        return cls(images, labels, len(class_names), class_names, mean, std, white)

    @property
    def pixels(self) -> Tensor:
        """The images as (N, H, W, ch) uint8, the same memory."""
        return self.images.permute(0, 2, 3, 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of each image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> ImageSet:
        """The same images with this mean and std, (ch,) both, in units where white is 1."""
        mean, std = (tuple(self.white * x for x in numbers) for numbers in (mean, std))
        return replace(self, mean=mean, std=std)

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, places: Tensor) -> ImageSet:
        """The samples at `places` (M,) int64 alone."""
        images = self.pixels[places].permute(0, 3, 1, 2)
        return replace(self, images=images, labels=self.labels[places])

    def subset(self, n: int, seed: int = 0) -> ImageSet:
        """`n` samples, as many of each class as there are, in the order of the set. Raises
        InputError where the set has fewer.

        Classes differ by one sample at most until one runs out, and a smaller subset of the same
        seed lies within a larger one.
        """
        return self.at(evenly(self.labels.cpu(), n, seed).to(self.labels.device))


def evenly(labels: Tensor, n: int, seed: int) -> Tensor:
    """(n,) samples of labels (N,), as `ImageSet.subset` takes them. Those without a label count as
    one more class."""
    if not 1 <= n <= len(labels):
        raise InputError(f"a subset of {n} images: the set allows 1 to {len(labels)}")
    labels = labels.masked_fill(labels == IGNORED, int(labels.max()) + 1)
    words = draw(check_seed(seed), 0, torch.arange(len(labels), device="cpu"), SUBSET)[0]
    return permutation((rank_in_class(labels, words) << 32) + words)[:n].sort().values
