"""What is kept of an exception that a contender ends with: words.

The exception itself keeps its traceback, that the frames it passed, and those their tensors: all
that a contender had allocated when it ran out of memory stays, and those after it run out as well.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import pytest


class Failure(NamedTuple):
    kind: type[BaseException]
    line: str  # its message, or the name of its class
    text: str  # its traceback

    def end_test(self, *absent: type[BaseException]) -> NoReturn:
        """Skips the running test for errors of the kinds `absent`; otherwise fails it."""
        if issubclass(self.kind, absent):
            pytest.skip(self.line)
        pytest.fail(self.text, pytrace=False)


def in_words(error: BaseException) -> Failure:
    """Clears the frames that the exception, its causes and its contexts passed, too: where one is
    part of a reference cycle, the garbage collector alone would free it."""
    message = str(error).strip() or type(error).__name__
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            waiting += [each.__cause__, each.__context__]
            traceback.clear_frames(each.__traceback__)
    return Failure(type(error), message.splitlines()[0], text)


def once(*absent: type[BaseException]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of what several tests share: it is measured once, and its last result is
    remembered. Where it raised, each of these tests ends with the same words: skipped for errors
    of the kinds `absent`, failed for others."""

    def decorate(measure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.lru_cache(maxsize=1)
        def remembered(*arguments: Any) -> Any:
            try:
                return measure(*arguments)
            except Exception as error:
                return in_words(error)

        @functools.wraps(measure)
        def measured(*arguments: Any) -> Any:
            result = remembered(*arguments)
            if isinstance(result, Failure):
                result.end_test(*absent)
            return result

        return measured

    return decorate
