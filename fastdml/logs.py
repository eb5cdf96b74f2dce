"""What fastdml says while it works, by Python's `logging`.

Each module logs through the logger of its name, all below "fastdml": at level INFO what it has
chosen and how training goes, at WARNING problems that do not stop it. These lines appear on stderr,
plain and above any progress bar, unless the user decides otherwise:

    logging.getLogger("fastdml").setLevel(logging.ERROR)        no lines
    logging.getLogger("fastdml").addHandler(handler)            this handler shows them, not fastdml
    logging.basicConfig(...)                                    the same, since its handler already
                                                                writes to the terminal
    logging.getLogger().addHandler(FileHandler("log"))          in the file as well

`warnings.warn` is for a mistake in the caller's code or data, at the line that made it. What a
command was asked for, such as a table, it prints on stdout.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastdml.terminal import underlying

LOGGER = logging.getLogger("fastdml")
# Records that `held` keeps back in this thread.
_held: ContextVar[list[logging.LogRecord] | None] = ContextVar("held", default=None)


class Stderr(logging.Handler):
    """Shows records on whatever stderr is at the time, where no handler of the user's does."""

    def emit(self, record: logging.LogRecord) -> None:
        held = _held.get()
        if held is not None:
            held.append(record)
        elif not self._shown_by_others():
            self._write(self.format(record))

    def _shown_by_others(self) -> bool:
        if any(handler is not self for handler in LOGGER.handlers):
            return True
        return LOGGER.propagate and any(map(_on_terminal, logging.getLogger().handlers))

    def _write(self, line: str) -> None:
        if sys.stderr is None:  # which print and tqdm would take for stdout
            return
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        try:
            if bars is None:
                print(line, file=sys.stderr)
            else:
                bars.write(line, file=sys.stderr)  # clears the bars, and draws them below
        except (OSError, ValueError):  # closed, full or without a reader: not worth a failure
            pass


def _on_terminal(handler: logging.Handler) -> bool:
    """Whether a handler writes to stdout or stderr. One of another package, such as rich's, is
    taken for one that does; those of `logging` with no stream write elsewhere or nowhere."""
    if isinstance(handler, logging.NullHandler):
        return False
    if isinstance(handler, logging.StreamHandler):
        streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        return any(underlying(handler.stream) is underlying(stream) for stream in streams)
    return type(handler).__module__.partition(".")[0] != "logging"


def install() -> None:
    """Lets records from INFO on appear on stderr. A level that the user has set stays."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(Stderr())


@contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Records of this block do not appear on stderr before the function that it yields is called,
    and never where it is not: a refusal is one line, without those that led to it. Handlers of the
    user's get them at once."""
    waiting: list[logging.LogRecord] = []
    token = _held.set(waiting)
    released = False

    def release() -> None:
        nonlocal released
        if not released:
            released = True
            _held.reset(token)
            for record in waiting:
                for handler in LOGGER.handlers:
                    if isinstance(handler, Stderr):
                        handler.handle(record)

    try:
        yield release
    finally:
        if not released:
            _held.reset(token)
