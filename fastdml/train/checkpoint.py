"""Checkpoints: tensors and plain values in one file that is always whole.

A file gets its name once it is on disk (`fastdml.files`), so that a process or a machine that dies
leaves the old checkpoint or the new one. Loading never runs code from the file
(`weights_only=True`) and compares its checksums. Costs one write of the weights and the optimizer's
state.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from fastdml.errors import InputError
from fastdml.files import NO_ROOM, Staged

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    try:
        with Staged() as staged, staged.open(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        cause = _origin(error)
        if not isinstance(cause, OSError):
            raise cause from None
        kept = " (the one before it is kept)" if path.exists() else ""
        remedy = ": make room and resume" if cause.errno in NO_ROOM else ""
        raise InputError(
            f"cannot write the checkpoint {path}{kept}: {cause.strerror or cause}{remedy}"
        ) from None


def _origin(error: BaseException) -> BaseException:
    """What happened first: torch's writer hides an error of the system, and an interruption, behind
    a RuntimeError of its own."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    return error


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the host."""
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        with opened:
            with zipfile.ZipFile(opened) as file:
                if file.testzip():  # torch itself looks at no checksum
                    raise zipfile.BadZipFile
            opened.seek(0)
            state = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can raise nearly anything
        raise InputError(
            f"{path} is not a checkpoint that can be read (truncated, damaged or another program's)"
        ) from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of this version of fastdml: format {found!r}, not {FORMAT}"
        )
    return state
