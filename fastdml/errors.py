"""Errors a user can cause, and the import of optional packages.

The command line prints an `InputError` as one line and exits with code 2; everything else is a
defect and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """The user's input (a value, a name, a file) is wrong; the message names it and the remedy."""


class MissingExtra(InputError, ImportError):
    """An optional package is not installed; the message is the command that installs it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error of somebody else's code says, to be part of a message of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}".removesuffix(": ")


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, or raises `MissingExtra` naming the extra of fastdml that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there and something it needs is broken: show that
        raise MissingExtra(
            f"{module.split('.')[0]} is not installed: pip install 'fastdml[{extra}]'"
        ) from None
