"""Image files of people (or vehicles) with their identities and cameras: what loaders take for
re-identification."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # torch and numpy are imported where they are used: see `registry`
    from torch import Tensor

    from fastdml.data.image_set import ImageSet
    from fastdml.image_record import Resize

# ImageNet's, in bytes: what peers trained on it expect, and usual in re-identification
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
STORED = (128, 64)  # Market-1501's own size: nothing is lost by keeping it


@dataclass(frozen=True, eq=False)
class ReidSplit:
    """Files with their identities. `labels` are the identities numbered from 0 in sorted order."""

    paths: tuple[str, ...] = field(repr=False)
    ids: Tensor = field(repr=False)  # (N,) int64, as in the file names
    cameras: Tensor = field(repr=False)  # (N,) int64, as in the file names
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    size: tuple[int, int] = STORED  # (height, width) that loaders decode files to
    labels: Tensor = field(init=False, repr=False)  # (N,) int64
    num_classes: int = field(init=False)
    resize: ClassVar[Resize] = "stretch"

    def __post_init__(self) -> None:
        known, labels = self.ids.unique(return_inverse=True)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "num_classes", len(known))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The identities, in the order of their labels."""
        return tuple(str(i) for i in self.ids.unique().tolist())

    def without(self, bad: dict[str, str]) -> ReidSplit:
        """The images whose paths are not among the keys of `bad`."""
        import torch

        keep = [i for i, path in enumerate(self.paths) if path not in bad]
        return self if len(keep) == len(self) else self.at(torch.tensor(keep, dtype=torch.int64))

    def at(self, places: Tensor) -> ReidSplit:
        """The images at `places` (M,) int64 alone."""
        paths = tuple(self.paths[i] for i in places.tolist())
        return replace(self, paths=paths, ids=self.ids[places], cameras=self.cameras[places])

    def subset(self, n: int, seed: int = 0) -> ReidSplit:
        """`n` images, as many of each identity as there are: see `ImageSet.subset`. Raises
        InputError where there are fewer."""
        from fastdml.data.image_set import evenly

        return self.at(evenly(self.labels, n, seed))

    def decode(self, size: tuple[int, int] | None = None) -> ImageSet:
        """All images in memory, (N, 3, height, width) uint8, of `size` (default: the set's): 25 kB
        each at 128x64. Raises BadImage, an InputError, for a file that cannot be decoded."""
        import numpy as np
        import torch

        from fastdml.data.files.decode import decode
        from fastdml.data.image_set import ImageSet

        size = size or self.size
        pixels = np.empty((len(self), *size, 3), np.uint8)
        for place, path in zip(pixels, self.paths, strict=True):
            place[...] = decode(path, size)
        return ImageSet.from_pixels(
            torch.from_numpy(pixels), self.labels, self.class_names, self.mean, self.std
        )
