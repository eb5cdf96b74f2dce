"""The data sets by name, each registered by its own file in `fastdml/data/sets/`.

Asking for names and facts imports neither torch nor numpy, so that the command's help and a
mistyped name answer at once: a file in `sets/` imports what reads pixels inside its functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from fastdml.errors import InputError
from fastdml.names import advice

HINT = "download=True"  # how a caller from Python asks for a download; the command has an option

Load = TypeVar("Load", bound=Callable[..., Any])


@dataclass(frozen=True)
class DataSet:
    """The facts about a data set that are known without its files."""

    name: str
    task: str  # the name of the task that trains on it: "classification", "reid"
    load: Callable[..., Any]
    # (channels, height, width) as it is kept in memory; None where only the files tell
    image_shape: tuple[int, int, int] | None
    num_classes: int  # identities, in re-identification; 0 where only the files tell
    classes: tuple[str, ...]  # their names by label; empty where only the files tell
    mean: tuple[float, ...]  # of each channel, in the units of the stored bytes; empty likewise
    std: tuple[float, ...]
    purpose: str  # what it is good for, a few words
    # none: comes with a package; download: fetched when asked for; own: the user brings it
    files: Literal["none", "download", "own"]
    place: str  # where below the root folder its files are looked for, a few words

    @property
    def input(self) -> str:
        """The images' shape as people write it, such as 3x32x32; "any" where only the files
        tell."""
        return "x".join(map(str, self.image_shape)) if self.image_shape else "any"


_KNOWN: dict[str, DataSet] = {}


def register_dataset(
    name: str,
    *,
    task: str,
    purpose: str,
    image_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Sequence[str] = (),
    num_classes: int | None = None,
    files: Literal["none", "download", "own"] = "own",
    place: str = "",
) -> Callable[[Load], Load]:
    """Decorates a function that loads a data set: registers it under `name`.

    A classification loader returns (train, test), both an `ImageSet`. It is called with the root
    folder, and where files is "download" with download=, a bool, and hint=, what messages say that
    a download is asked for by; where files is "none", with nothing. `DataSet` says what the other
    arguments mean; num_classes is that of `classes` unless it is given.

    Raises ValueError for a name that another loader has.
    """

    def register(load: Load) -> Load:
        known = _KNOWN.get(name)
        if known and (known.load.__module__, known.load.__name__) != (
            load.__module__,
            load.__name__,
        ):
            raise ValueError(
                f"the data set {name!r} is registered by {known.load.__module__} already: give "
                "another name"
            )
        _KNOWN[name] = DataSet(
            name,
            task,
            load,
            image_shape,
            len(classes) if num_classes is None else num_classes,
            tuple(classes),
            tuple(mean),
            tuple(std),
            purpose,
            files,
            place,
        )
        return load

    return register


def catalogue() -> tuple[DataSet, ...]:
    """All data sets: first those that need no files, last those of re-identification; within these
    from few classes to many, then those whose classes only the files tell."""
    _import_sets()

    def place(known: DataSet) -> tuple[bool, bool, bool, int]:
        classes = known.num_classes
        return known.files != "none", known.task == "reid", not classes, classes

    return tuple(sorted(_KNOWN.values(), key=place))


def dataset_names(task: str | None = None) -> tuple[str, ...]:
    """The names of all data sets, or of those of one task, in the order of `catalogue`."""
    return tuple(known.name for known in catalogue() if task in (None, known.task))


def dataset(name: str, task: str | None = None) -> DataSet:
    """The data set called `name`. Raises InputError, which names the nearest, where there is none,
    or none of `task`."""
    names = dataset_names(task)
    if name not in names:
        raise InputError(
            f"unknown data set {name!r}: {advice(name, names, others='give one of {}')}"
        )
    return _KNOWN[name]


@cache
def _import_sets() -> None:
    """Each file in `sets/` registers its own when it is imported."""
    package = importlib.import_module("fastdml.data.sets")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
