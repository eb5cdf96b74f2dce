"""Image sets, from checked files or from scikit-learn, and the loaders that batch them.

Names are imported when first used: the processes that decode files need no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.errors import InputError
from fastdml.names import advice

if TYPE_CHECKING:
    from fastdml.data.loaders.dali import DALILoader
    from fastdml.data.loaders.make import choose_loader, make_loader
    from fastdml.data.loaders.resident import ResidentLoader
    from fastdml.data.loaders.torch_workers import TorchLoader
    from fastdml.data.samplers import PKSampler, RandomSampler, RepeatedSampler
    from fastdml.data.sets.cifar import load_cifar10, load_cifar100
    from fastdml.data.sets.digits import load_digits
    from fastdml.data.sets.image_set import ImageSet
    from fastdml.data.sets.market1501 import ImageFolderReID, Market1501, ReidSplit

HINT = "download=True"  # how a caller from Python asks for a download; the command has an option
SETS = ("digits", "cifar10", "cifar100")
_HOMES = {
    "DALILoader": "loaders.dali",
    "ImageFolderReID": "sets.market1501",
    "ImageSet": "sets.image_set",
    "Market1501": "sets.market1501",
    "PKSampler": "samplers",
    "RandomSampler": "samplers",
    "ReidSplit": "sets.market1501",
    "RepeatedSampler": "samplers",
    "ResidentLoader": "loaders.resident",
    "TorchLoader": "loaders.torch_workers",
    "choose_loader": "loaders.make",
    "load_cifar10": "sets.cifar",
    "load_cifar100": "sets.cifar",
    "load_digits": "sets.digits",
    "make_loader": "loaders.make",
}

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
    "record",
]


def load(
    name: str, root: str | Path = "data", *, download: bool = False, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of "digits", "cifar10" or "cifar100"; digits need no files. hint: what messages
    say that a download is asked for by."""
    if name not in SETS:
        remedy = advice(name, SETS, others="give one of {}")
        raise InputError(f"unknown data set {name!r}: {remedy}")
    read = __getattr__(f"load_{name}")
    return read() if name == "digits" else read(root, download=download, hint=hint)


def record(name: str) -> dict[str, list]:
    """What `Cohort.record` says after training on one of `SETS`, known without its files."""
    if name == "digits":
        home, shape = importlib.import_module("fastdml.data.sets.digits"), (1, 8, 8)
        classes = home.CLASSES
    else:
        home = importlib.import_module("fastdml.data.sets.cifar")
        shape, classes = home.SHAPE, getattr(home, name.upper()).class_names
    found = {"image_shape": shape, "mean": home.MEAN, "std": home.STD, "classes": classes}
    return {key: list(values) for key, values in found.items()}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastdml.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastdml.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
