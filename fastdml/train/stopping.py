"""Signals that ask training to end.

After such a signal a run finishes its step, saves a checkpoint and raises `TrainingStopped`, with
the exit code that shells give to the signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fastdml.notebook import without_advice_to_exit

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TrainingStopped(SystemExit):
    """A signal ended training; the checkpoint is written and `resume` goes on from it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stop:
    """The signal that asked training to end, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def leave_if_asked(self, where: Callable[[], str]) -> None:
        """Call right after a checkpoint. where: says at which step training stands, and what is
        saved, for the message of TrainingStopped."""
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            without_advice_to_exit()
            raise TrainingStopped(self.signal, f"stopped by {name} {where()}")


@contextmanager
def listening() -> Iterator[Stop]:
    """In this block SIGINT, SIGTERM and SIGHUP (of a terminal that goes away) set `signal`; a
    second one has its usual effect. Signals that the process ignores, as under nohup, stay
    ignored."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
