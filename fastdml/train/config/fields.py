"""Types and limits of settings: values from anywhere are converted to their field's type, and
checked.

It serves any dataclass whose fields are bool, int, float, str, one of some names (`Literal`), a
tuple of those, or `... | None`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from fastdml.errors import InputError
from fastdml.names import advice

Class = TypeVar("Class", bound=type)
Limit = tuple[Callable[[Any], bool], str]  # a condition on values, and its text in messages

POSITIVE: Limit = (lambda x: x > 0, "above 0")
COUNT: Limit = (lambda x: x >= 1, "1 or more")
NOT_NEGATIVE: Limit = (lambda x: x >= 0, "0 or more")
FRACTION: Limit = (lambda x: 0 <= x <= 1, "within 0..1")

KINDS = {bool: "true or false", str: "text", int: "a whole number", float: "a finite number"}


def field_types(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass, by name."""
    return _field_types(kind)


@cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


class FieldText(NamedTuple):
    """The documentation of a field in the source of its dataclass."""

    group: str  # the comment `# --- group` above it
    name: str
    text: str  # the string below it


def field_texts(kind: type) -> Iterator[FieldText]:
    """The text of each field that the class `kind` itself defines. Raises OSError where the source
    is not installed."""
    source = inspect.getsource(kind)
    groups = {
        number: line.strip(" #-")
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip().startswith("# ---")
    }
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            group = groups[max(number for number in groups if number < field.lineno)]
            text = " ".join(ast.literal_eval(below.value).split())
            yield FieldText(group, ast.unparse(field.target), text)


def documented(kind: Class) -> Class:
    """Adds groups, types, defaults and texts of a dataclass's own fields to its docstring, so that
    help() shows them."""
    try:
        texts = list(field_texts(kind))
    except OSError:  # an installation without sources
        return kind
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lines, group = [inspect.cleandoc(kind.__doc__ or "")], None
    for text in texts:
        if text.group != group:
            group = text.group
            lines += ["", f"{group}", "=" * len(group)]
        field = fields[text.name]
        lines.append(f"{text.name}: {field.type} = {field.default!r}")
        lines += textwrap.wrap(text.text, 92, initial_indent="    ", subsequent_indent="    ")
    kind.__doc__ = "\n".join(lines)
    return kind


def check_names(names: Iterable[Any], kind: type, where: str = "") -> None:
    """Raises InputError for a name that is no field of `kind`, with the nearest that is one.
    where: of the name, for the message, such as " in FILE"."""
    known = list(field_types(kind))
    for name in names:
        if name not in known:
            hint = advice(str(name), known, others="the settings are {}")
            raise InputError(f"unknown setting {name!r}{where}; {hint}")


def check_limit(name: str, value: Any, limits: Mapping[str, Limit]) -> None:
    """Raises InputError where there is a limit for `name` that `value` does not keep."""
    if name in limits:
        accepts, meaning = limits[name]
        if not accepts(value):
            raise InputError(f"{name} must be {meaning}, not {value!r}")


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, without guessing: 64.0 is an int, "1e-3" a float, 1 no bool.
    Raises InputError, which calls it `name`, where it is not of that type."""
    if NoneType in get_args(hint):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return _choice(name, value, get_args(hint))
    if get_origin(hint) is tuple:
        return _several(name, value, get_args(hint)[0])
    return _scalar(name, value, hint)


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value is False and "off" in choices:
        return "off"  # YAML 1.1 reads a bare `off` as false
    if not any(type(value) is type(c) and value == c for c in choices):  # 1 == 1.0 == True
        named = ", ".join(map(str, choices))
        raise InputError(f"{name} must be one of {named}, not {value!r}")
    return value


def _several(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        items = "numbers" if hint in (int, float) else "names"
        raise InputError(f"{name} must be a list of {items}, not {value!r}")
    return tuple(convert(name, item, hint) for item in value)


def _scalar(name: str, value: Any, hint: Any) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (hint is float or number.is_integer()):
            return hint(number)
    raise InputError(f"{name} must be {KINDS[hint]}, not {value!r}")
