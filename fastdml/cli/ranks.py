"""The command as one of torchrun's ranks: one of them speaks for all, and all end at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def started() -> bool:
    """Whether this process is one of several ranks that a launcher started."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def lead() -> bool:
    return not started() or os.environ["RANK"] == "0"


def run(command: Callable[[list[str]], int], args: list[str]) -> NoReturn:
    """Runs a command on this rank, and ends the process at once: at the interpreter's end torch can
    wait for ranks that are gone, and its threads can abort this one (see `parallel.ending`)."""
    _end_with_launcher()
    try:
        code = command(args)
    except Exception as error:
        from fastdml.parallel import RankLost, failure

        line, code = f"fastdml: error: {line_of(error)}", 1
        speaking = speaks(line)
        if not isinstance(error, RankLost) and not failure.of_collective(error):
            traceback.print_exc()  # a defect, here and not on another rank
            speaking = True
        if speaking:
            print(line, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def line_of(error: Exception) -> str:
    """An error's words; of several ranks with the one that it came from."""
    if not started():
        return str(error)
    from fastdml.parallel import failure

    return failure.line_of(error)


def speaks(line: str) -> bool:
    """Whether this rank is the one of its machine that prints the line that ends the job."""
    from fastdml.parallel.failure import tell

    return tell(line)


def _end_with_launcher() -> None:
    """Has Linux send SIGTERM when the agent that started this rank dies, which would else leave it
    running: it then saves and ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
