"""A user's own model, package.module:function: imported, called and checked, with every mistake in
one line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from fastdml.errors import InputError, one_line
from fastdml.models import registry
from fastdml.names import nearest


def is_own(name: str) -> bool:
    """Whether a name means the user's own code, package.module:function, which it would import."""
    return ":" in name and not name.startswith("timm:")


def import_own(name: str, arguments: Mapping[str, object]) -> nn.Module:
    """The model that package.module:function makes. In place of a function there may be a name that
    the module registers by `register_model`. Raises InputError for whatever goes wrong."""
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f"cannot read the model {name!r}: write package.module:function")
    module = _imported(name, module_name, function_name)
    numbers: Mapping[str, int] = {}
    if hasattr(module, function_name):
        function = getattr(module, function_name)
    else:
        found = registry.find(function_name)
        if found is None or found[0].build.__module__ != module_name:
            public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise InputError(
                f"model {name!r}: {module_name} has no function {function_name!r}; "
                f"{nearest_names(function_name, public)}"
            )
        function, numbers = found[0].build, found[1]
    if isinstance(function, nn.Module) or not callable(function):
        raise InputError(
            f"model {name!r}: {function_name} is of type {type(function).__name__}: name a "
            "function that takes num_classes and returns a torch nn.Module"
        )
    return call_own(name, function, arguments, numbers)


def _imported(name: str, module_name: str, function_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a module may raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise InputError(
                f"model {name!r}: importing {module_name} fails: {one_line(error)}"
            ) from error
        remedy = "install it, or put its folder on PYTHONPATH"
        if module_name.endswith(".py"):
            remedy = f"give the module's name, {module_name.removesuffix('.py')}:{function_name}"
        raise InputError(f"model {name!r}: no module {missing!r}; {remedy}") from None


def call_own(
    name: str,
    function: Callable[..., object],
    arguments: Mapping[str, object],
    numbers: Mapping[str, int],
) -> nn.Module:
    """Calls a user's function with those of `arguments` that it takes, and with the `numbers` in
    the name that it is registered under; returns its model."""
    given = {**taken_by(function, arguments), **numbers}
    try:
        _signature(function).bind(**given)
    except TypeError as error:
        raise InputError(
            f"model {name!r}: the function gets {' and '.join(given) or 'nothing'} alone (of "
            f"num_classes and in_channels what it takes by name): {error}"
        ) from None
    try:
        model = function(**given)
    except Exception as error:  # whatever a user's code may raise
        listed = ", ".join(f"{key}={value}" for key, value in given.items())
        called = name.rpartition(":")[2]
        raise InputError(f"model {name!r}: {called}({listed}) fails: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model {name!r}: the function returned {type(model).__name__}, not a torch nn.Module"
        )
    return model


def taken_by(function: Callable[..., object], arguments: Mapping[str, object]) -> dict[str, Any]:
    """Those of `arguments` that the signature of `function` names. One with ** gets num_classes
    too, as functions of libraries pass it on to their models; the logits show whether it was
    used."""
    parameters = _signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named.add("num_classes")
    return {key: value for key, value in arguments.items() if key in named}


def _signature(function: Callable[..., object]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:  # some builtins have none
        return inspect.Signature()


def nearest_names(name: str, names: Iterable[str]) -> str:
    """The names closest to `name`, for a message; where nothing is close, all, if they are few."""
    names = list(names)
    close = nearest(name, names, similarity=0.5)
    if not close and len(names) > 12:
        return f"none of its {len(names)} names is like it"
    return f"{'nearest' if close else 'there is'}: {', '.join(close or names) or 'nothing'}"
