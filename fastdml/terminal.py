"""Standard streams that are closed, full or without a reader must not end a run.

A daemon starts with them closed, cron may have closed one, a log's disk fills up, `| head` or a
lost connection takes the reader away. Training does not depend on its lines on stderr.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def complete_streams() -> None:
    """Gives those of the process that are closed to /dev/null. The next file opened would get the
    number of one, and with it what libraries print there."""
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def print_anything() -> None:
    """Lets `print` take any text. Names of files come out byte for byte; other characters that the
    terminal's encoding lacks come out as escapes, such as é under ASCII, as \\xe9."""
    codecs.register_error("fastdml", _as_bytes_or_escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastdml")


def _as_bytes_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def discard(stream: TextIO) -> None:
    """Sends to /dev/null what the stream still holds and what it gets from now on; otherwise
    Python's flush at exit would fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Lenient:
    """A stream whose writes never fail; in all else the one that it is made from."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def underlying(stream: Any) -> Any:
    """The stream that a `Lenient` one is made from; any other is its own."""
    return stream._stream if isinstance(stream, Lenient) else stream


@contextlib.contextmanager
def lenient_stderr() -> Iterator[None]:
    """In this block nothing fails because stderr does."""
    if isinstance(sys.stderr, Lenient):
        yield
        return
    with contextlib.ExitStack() as stack:
        # None is what Python makes of a closed one
        stream = sys.stderr or stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stderr(Lenient(stream)))
        yield
