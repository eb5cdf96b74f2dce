"""Labelled image files of any size and form, decoded to one size when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdml import host
from fastdml.data.files.check_files import progress_bar
from fastdml.data.files.decode import decode
from fastdml.data.image_set import ImageSet, evenly
from fastdml.data.reid_split import MEAN, STD

if TYPE_CHECKING:
    from fastdml.image_record import Resize

In = TypeVar("In")
Out = TypeVar("Out")

MEASURED = 2_000  # images that mean and std are measured on, at most
SMALL = 64  # pixels a side that images of one size may have to be left as they are
LOOKED_AT = 1_000  # files whose size is looked at, at most
AT_ONCE = 1_024  # files that wait for a thread


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files with their labels. mean and std: ImageNet's until others are measured (`statistics`).

    size: (height, width) that they are decoded to, by `files.decode.resized`.
    """

    paths: tuple[str, ...] = field(repr=False)
    labels: Tensor = field(repr=False)  # (N,) int64, each in [0, num_classes)
    class_names: tuple[str, ...]
    size: tuple[int, int]
    mean: tuple[float, ...] = MEAN  # (3,) in units of bytes
    std: tuple[float, ...] = STD  # (3,)
    resize: Resize = "crop"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of each image."""
        return 3, *self.size

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> ImageFiles:
        """The same images with this mean and std, (3,) both, in units where white is 1."""
        mean, std = (tuple(255 * x for x in numbers) for numbers in (mean, std))
        return replace(self, mean=mean, std=std)

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, places: Tensor) -> ImageFiles:
        """The images at `places` (M,) int64 alone."""
        paths = tuple(self.paths[i] for i in places.tolist())
        return replace(self, paths=paths, labels=self.labels[places])

    def without(self, bad: Mapping[str, str]) -> ImageFiles:
        """The images whose paths are not among the keys of `bad`."""
        keep = [i for i, path in enumerate(self.paths) if path not in bad]
        return self if len(keep) == len(self) else self.at(torch.tensor(keep, dtype=torch.int64))

    def subset(self, n: int, seed: int = 0) -> ImageFiles:
        """`n` images, as many of each class as there are: see `ImageSet.subset`. Raises InputError
        where there are fewer."""
        return self.at(evenly(self.labels, n, seed))

    def decode(self, size: tuple[int, int] | None = None) -> ImageSet:
        """All images in memory, (N, 3, height, width) uint8, by a thread for each CPU. Raises
        BadImage, an InputError, for a file that cannot be decoded."""
        size = size or self.size
        pixels = np.empty((len(self), *size, 3), np.uint8)

        def fill(i: int) -> None:
            pixels[i] = decode(self.paths[i], size, self.resize)

        bar = progress_bar(len(self), "decoding images", None if len(self) > AT_ONCE else False)
        for _ in _in_threads(fill, range(len(self))):
            bar.update(1)
        bar.close()
        return ImageSet.from_pixels(
            torch.from_numpy(pixels), self.labels, self.class_names, self.mean, self.std
        )

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of each channel, over all pixels of at most `MEASURED` images, evenly of each
        class and always the same ones, at `size`. Raises BadImage."""
        some = self.subset(min(len(self), MEASURED))

        def count(path: str) -> np.ndarray:  # (3, 256) pixels of each value
            pixels = decode(path, self.size, self.resize).reshape(-1, 3)
            return np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])

        counts = np.zeros((3, 256), np.int64)
        for found in _in_threads(count, some.paths):
            counts += found  # whole numbers: the same sum in any order
        values, total = np.arange(256), counts[0].sum()
        mean = counts @ values / total
        variance = counts @ values**2 / total - mean**2
        std = [float(v) ** 0.5 if v > 1e-6 else 1.0 for v in variance]  # 1: all pixels are equal
        return tuple(mean.tolist()), tuple(std)

    def own_size(self) -> tuple[int, int] | None:
        """The (height, width) that all images have, if there is one and it is at most `SMALL` each
        way, else None. Looks at `LOOKED_AT` files, evenly of each class. Raises BadImage."""
        first: tuple[int, int] | None = None
        for path in self.subset(min(len(self), LOOKED_AT)).paths:
            height, width, _ = decode(path).shape
            if first not in (None, (height, width)) or max(height, width) > SMALL:
                return None
            first = height, width
        return first


class Splits(NamedTuple):
    """What a data set consists of; None: it has no such part."""

    train: Any  # an ImageSet or ImageFiles, as all are
    validation: Any | None
    test: Any | None

    def each(self, change: Callable[[Any], Any]) -> Splits:
        """What `change` makes of each part that there is."""
        rest = (part if part is None else change(part) for part in self[1:])
        return Splits(change(self.train), *rest)


def _in_threads(work: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
    """The results in the order of the items. Pillow decodes outside of Python's lock."""
    with ThreadPoolExecutor(host.cpus()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])
