"""Image sets, from checked files or from scikit-learn, and the loaders that batch them.

Names are imported when first used: the processes that decode files need no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.data.registry import (
    HINT,
    DataSet,
    catalogue,
    dataset,
    dataset_names,
    register_dataset,
)

if TYPE_CHECKING:
    from fastdml.data.image_files import ImageFiles
    from fastdml.data.image_set import ImageSet
    from fastdml.data.loaders.dali import DALILoader
    from fastdml.data.loaders.make import choose_loader, make_loader
    from fastdml.data.loaders.resident import ResidentLoader
    from fastdml.data.loaders.torch_workers import TorchLoader
    from fastdml.data.reid_folders import ImageFolderReID
    from fastdml.data.reid_split import ReidSplit
    from fastdml.data.samplers import MixedSampler, PKSampler, RandomSampler, RepeatedSampler
    from fastdml.data.sets.cifar import load_cifar10, load_cifar100
    from fastdml.data.sets.digits import load_digits
    from fastdml.data.sets.folder import load_folder
    from fastdml.data.sets.market1501 import Market1501
    from fastdml.data.validation import split_validation

_HOMES = {
    "DALILoader": "loaders.dali",
    "ImageFolderReID": "reid_folders",
    "ImageFiles": "image_files",
    "ImageSet": "image_set",
    "Market1501": "sets.market1501",
    "MixedSampler": "samplers",
    "PKSampler": "samplers",
    "RandomSampler": "samplers",
    "ReidSplit": "reid_split",
    "RepeatedSampler": "samplers",
    "ResidentLoader": "loaders.resident",
    "TorchLoader": "loaders.torch_workers",
    "choose_loader": "loaders.make",
    "load_cifar10": "sets.cifar",
    "load_cifar100": "sets.cifar",
    "load_digits": "sets.digits",
    "load_folder": "sets.folder",
    "make_loader": "loaders.make",
    "split_validation": "validation",
}

__all__ = [
    "HINT",
    "DALILoader",
    "DataSet",
    "ImageFiles",
    "ImageFolderReID",
    "ImageSet",
    "Market1501",
    "MixedSampler",
    "PKSampler",
    "RandomSampler",
    "ReidSplit",
    "RepeatedSampler",
    "ResidentLoader",
    "TorchLoader",
    "catalogue",
    "choose_loader",
    "dataset",
    "dataset_names",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_folder",
    "make_loader",
    "record",
    "register_dataset",
    "split_validation",
]


def load(
    name: str, root: str | Path = "data", *, download: bool = False, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a data set for classification: see `dataset_names("classification")`.

    root: the folder of its files, for a set that has files. download: fetch them where they are
    missing and can be fetched. hint: what messages say that a download is asked for by. Raises
    InputError for an unknown name, and for files that are missing or damaged.
    """
    known = dataset(name, "classification")
    if known.files == "none":
        return known.load()
    if known.files == "own":
        return known.load(root)
    return known.load(root, download=download, hint=hint)


def record(name: str) -> dict[str, Any]:
    """What `Cohort.record` says after training on a classification set, known without its files.
    Raises InputError for an unknown name."""
    known = dataset(name, "classification")
    keys = ("image_shape", "mean", "std", "classes")
    return {key: list(getattr(known, key)) for key in keys} | {"resize": None, "stored": None}


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"fastdml.data.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'fastdml.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
