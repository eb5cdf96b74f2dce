"""Checkpoints: tensors and plain values in one file that is always whole.

A file is written under a temporary name, forced to disk, renamed, and the folder forced to disk, so
that a process or a machine that dies leaves the old checkpoint or the new one. Loading never runs
code from the file (`weights_only=True`) and compares its checksums. Costs one write of the weights
and the optimizer's state.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastdml.errors import InputError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = " (the one before it is kept)" if path.exists() else ""
        if isinstance(error.__context__, OSError):  # which torch hides behind a RuntimeError
            error = error.__context__
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write the checkpoint {path}{kept}: {why}") from None


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the host."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch itself looks at no checksum
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
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
