"""Triton's interpreter in half of its time: the language is patched once a launch.

The interpreter runs a kernel as Python whose `triton.language` works on NumPy's arrays. To that end
it replaces the language's functions when a launch begins, puts them back when it ends, and replaces
them once more for each call of a function in between, which changes nothing: the search for what is
to be replaced took more time than the arithmetic. Here a call finds the languages that its function
sees replaced already, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import ismodule
from types import ModuleType
from typing import Any

from triton.runtime import interpreter

replaced: set[ModuleType] = set()  # languages whose functions work on arrays, within a launch
replace_for = interpreter._patch_lang
launch = interpreter.GridExecutor.__call__


@cache
def languages(function: Callable[..., Any]) -> frozenset[ModuleType]:
    """Those that a kernel, or a function of one, sees."""
    both = interpreter.tl, interpreter.tl.core
    return frozenset(v for v in function.__globals__.values() if ismodule(v) and v in both)


def replace_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
    if replaced and languages(function) <= replaced:
        return interpreter._LangPatchScope()  # there is nothing to put back
    replaced.update(languages(function))
    return replace_for(function)


@wraps(launch)
def launch_anew(self: Any, *arguments: Any, **named: Any) -> None:
    """What the last launch has put back is to be replaced again."""
    replaced.clear()
    try:
        launch(self, *arguments, **named)
    finally:
        replaced.clear()


def patch_once_a_launch() -> None:
    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_anew
