"""Errors a user can cause, and the import of optional packages.

The command line prints an `InputError` as one line and exits with code 2; everything else is a
defect and keeps its traceback.
"""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from types import ModuleType


class InputError(ValueError):
    """The user's input (a value, a name, a file) is wrong; the message names it and the remedy."""


class MissingExtra(InputError, ImportError):
    """An optional package is not installed; the message is the command that installs it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error of another package's or the user's code as part of a message of one line: its type,
    its text, and the line of the user's own code that it came from."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and not _installed(f.filename)]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text


def _installed(filename: str) -> bool:
    path = Path(filename)
    return "site-packages" in path.parts or Path(__file__).parent in path.parents


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, or raises `MissingExtra` naming the extra of fastdml that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there and something it needs is broken: show that
        package = "NVIDIA DALI" if module.startswith("nvidia.dali") else module.split(".")[0]
        raise MissingExtra(f"{package} is not installed: pip install 'fastdml[{extra}]'") from None
