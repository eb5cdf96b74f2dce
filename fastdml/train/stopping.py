"""Signals that ask training to end, or to save.

After SIGINT, SIGTERM or SIGHUP a run finishes its step, saves a checkpoint and raises
`TrainingStopped`, with the exit code that shells give to the signal. After SIGUSR1 it saves and
goes on. On a mesh a signal to any rank is one to all: ranks tell each other by flags.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fastdml.notebook import without_advice_to_exit

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING = signal.SIGUSR1
# Flags of a rank: to save; that a save beside training has failed; a signal of STOPPING each.
SAVE, FAILED, *SIGNALS = (1 << i for i in range(2 + len(STOPPING)))


class TrainingStopped(SystemExit):
    """A signal ended training; the checkpoint is written and `resume` goes on from it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stop:
    """The signal that asked training to end, if one did, and whether one asked it to save."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.save = False

    @property
    def flags(self) -> int:
        """What this process was asked for, as flags."""
        stopping = dict(zip(STOPPING, SIGNALS, strict=True))
        return SAVE * self.save | (stopping[signal.Signals(self.signal)] if self.signal else 0)

    def heed(self, flags: int) -> bool:
        """Takes over what any process was asked for: whether that is to save, or to save and
        end."""
        for number, flag in zip(STOPPING, SIGNALS, strict=True):
            if flags & flag and self.signal is None:
                self.signal = number
        return bool(flags & ~FAILED)

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
    second one has its usual effect. SIGUSR1 sets `save`. Signals that the process ignores, as under
    nohup, stay ignored, and so does a SIGUSR1 that the caller's code handles."""
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

    def save(number: int, frame: FrameType | None) -> None:
        stop.save = True

    for number in before:
        signal.signal(number, note)
    saves = signal.getsignal(SAVING) == signal.SIG_DFL
    if saves:
        signal.signal(SAVING, save)
    try:
        yield stop
    finally:
        restore()
        if saves:
            signal.signal(SAVING, signal.SIG_DFL)
