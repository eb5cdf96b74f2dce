"""The models by name, each registered by its own file in `fastdml/models/` or by a user's file."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import nn

Build = TypeVar("Build", bound=Callable[..., nn.Module])

NUMBER = r"[1-9]\d{0,3}"  # what a placeholder of a family stands for


@dataclass(frozen=True)
class Model:
    """A model, or a family of them such as resnet{depth}."""

    pattern: str
    build: Callable[..., nn.Module]
    listed: tuple[str, ...]  # the names to show; of a family a few
    purpose: str
    input: str

    @property
    def is_family(self) -> bool:
        return "{" in self.pattern

    def numbers(self, name: str) -> dict[str, int] | None:
        """The numbers in `name`, by the placeholders of the pattern; None where it does not fit."""
        if not self.is_family:
            return {} if name == self.pattern else None
        parts = re.split(r"\{(\w+)\}", self.pattern)  # text and placeholders in turn
        expression = "".join(
            f"(?P<{part}>{NUMBER})" if place % 2 else re.escape(part)
            for place, part in enumerate(parts)
        )
        match = re.fullmatch(expression, name)
        return match and {key: int(value) for key, value in match.groupdict().items()}


_KNOWN: dict[str, Model] = {}


def register_model(
    pattern: str, *, listed: Sequence[str] = (), purpose: str = "", input: str = "any size"
) -> Callable[[Build], Build]:
    """Decorates a class or function that makes a model: registers it under a name.

    @register_model("mynet")
    def mynet(num_classes: int, in_channels: int = 3) -> nn.Module: ...

    It is called with those of these arguments that its signature names: num_classes, in_channels,
    and for re-identification large=True (the form for large images) and last_stride (1 or 2).

    A pattern with placeholders, such as "resnet{depth}", is a family: each placeholder stands for a
    number from 1 to 9999, which the function gets as an argument of that name. `listed`: a few of
    its names, for help texts and suggestions. purpose and input (the images that it takes): for
    `fastdml models`.

    Raises ValueError for a name that another model has.
    """

    def register(build: Build) -> Build:
        known = _KNOWN.get(pattern)
        if known and _home(known.build) != _home(build):
            raise ValueError(
                f"the model {pattern!r} is registered by {known.build.__module__} already: give "
                "another name"
            )
        names = tuple(listed) or (() if "{" in pattern else (pattern,))
        _KNOWN[pattern] = Model(pattern, build, names, purpose, input)
        return build

    return register


def models() -> list[Model]:
    """All that are registered, families first."""
    _import_models()
    return sorted(_KNOWN.values(), key=lambda model: (not model.is_family, model.pattern))


def find(name: str) -> tuple[Model, dict[str, int]] | None:
    """The model that `name` means, and the numbers in the name. One registered under exactly this
    name comes before a family."""
    for model in reversed(models()):
        numbers = model.numbers(name)
        if numbers is not None:
            return model, numbers
    return None


def neighbours(number: int, valid: Callable[[int], bool]) -> list[int]:
    """The valid numbers just below (where there is one) and just above `number`."""
    below = next(([n] for n in range(number - 1, 0, -1) if valid(n)), [])
    return [*below, next(n for n in itertools.count(number + 1) if valid(n))]


def _home(build: Callable[..., Any]) -> tuple[str, str]:
    return build.__module__, build.__qualname__


@cache
def _import_models() -> None:
    """Each file of the package registers its own when it is imported."""
    package = importlib.import_module("fastdml.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
