"""Paths as people write them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastdml.errors import InputError


def expanded(path: str | os.PathLike) -> Path:
    """`path` with a leading `~` or `~user` as that home folder: see `expand`."""
    return Path(expand(path))


def expand(path: str | os.PathLike) -> str:
    """`path` as text, with a leading `~` or `~user` as that home folder, as a shell reads it.

    A shell leaves it alone within quotes and in --folder='~/x'. Where an account has no home
    folder, `~` is refused, rather than made as a folder of that name; an unknown user's stays.
    """
    if isinstance(path, bytes) or not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a path is text or a Path, not {path!r}")
    text = os.fspath(path)
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # of a locale without UTF-8
        encoded = b"\0"
    if b"\0" in encoded:
        raise InputError(
            f"{text!r} cannot be the name of a file here (names are in "
            f"{sys.getfilesystemencoding()})"
        )
    if not text.startswith("~"):
        return text
    if text.partition("/")[0] == "~" and home() is None:
        raise InputError(f"{text}: this account has no home folder: write the folder's name out")
    return os.path.expanduser(text)


def home() -> Path | None:
    """The user's home folder; None for an account of a container that has none."""
    try:
        return Path.home()
    except RuntimeError:
        return None
