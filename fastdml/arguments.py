"""Arguments of public functions that are of another kind than is meant: one line that names the
value and what to give."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from fastdml.errors import InputError

Kind = TypeVar("Kind")
SHOWN = 80  # characters of a value


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises InputError for what is none, or below `least`."""
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # of a tensor that is no whole number, the latter
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {shown(value)}")
    return number


def finite_number(name: str, value: Any) -> float:
    """`value` as a float. Raises InputError for text, for NaN and for what is infinite."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, not {shown(value)}")
    return number


def listed(name: str, value: Any, what: str) -> list[Any]:
    """`value` as a list of `what`. Raises InputError for a single one, and for text, whose
    characters would be taken for the items."""
    if not isinstance(value, (str, bytes, Mapping)):
        try:
            return list(value)
        except TypeError:
            pass
    raise InputError(f"{name} must be a list of {what}, not {shown(value)}")


def numbers(name: str, value: Any) -> np.ndarray:
    """An array of numbers or of true and false, from lists, arrays or tensors on any device; such
    of a dtype that numpy lacks as float64. Raises InputError for anything else."""
    array = None
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # rows of several lengths, say
        pass
    if array is None or array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be an array of numbers, not {shown(value)}")
    return array


def of_kind(name: str, value: Any, kind: type[Kind], source: str) -> Kind:
    """`value`, if it is of `kind`. source: what gives such. Raises InputError."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be what {source} gives, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in a message, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
