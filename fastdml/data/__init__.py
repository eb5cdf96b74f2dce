"""Image sets, from checked files or from scikit-learn, and the loaders that batch them."""

from __future__ import annotations

import difflib
from pathlib import Path

from fastdml.data.cifar import load_cifar10, load_cifar100
from fastdml.data.dali import DALILoader
from fastdml.data.digits import load_digits
from fastdml.data.image_set import ImageSet
from fastdml.data.loaders import choose_loader, make_loader
from fastdml.data.per_image import TorchLoader
from fastdml.data.reid import ImageFolderReID, Market1501, ReidSplit
from fastdml.data.resident import ResidentLoader
from fastdml.data.samplers import PKSampler, RandomSampler, RepeatedSampler
from fastdml.errors import InputError

__all__ = [
    "DALILoader",
    "ImageFolderReID",
    "ImageSet",
    "Market1501",
    "PKSampler",
    "RandomSampler",
    "ReidSplit",
    "RepeatedSampler",
    "ResidentLoader",
    "TorchLoader",
    "choose_loader",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "make_loader",
]


def load(
    name: str, root: str | Path = "data", *, download: bool = False
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of "digits", "cifar10" or "cifar100"; digits need no files."""
    if name == "digits":
        return load_digits()
    readers = {"cifar10": load_cifar10, "cifar100": load_cifar100}
    if name not in readers:
        names = ["digits", *readers]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(names)}"
        raise InputError(f"unknown data set {name!r}: {hint}")
    return readers[name](root, download=download)
