"""What is said of a training, or of a reading of one, that fails by an error nobody foresaw."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path


def log_of(folder: Path) -> Path:
    """Beside a run folder: what a process of its own said, and tracebacks."""
    return folder.with_name(f"{folder.name}.log")


def kept_traceback(error: Exception, folder: Path) -> str:
    """One line; the traceback is added to the run's log, where that can be written."""
    line = f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
    log = log_of(folder)
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", errors="replace") as file:
            traceback.print_exception(error, file=file)
        return f"{line}; {log} has all of it"
    return line
