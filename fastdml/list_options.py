"""Command-line options that take several values, separated by commas or blanks."""

from __future__ import annotations

from collections.abc import Sequence


def split_lists(args: Sequence[str], lists: Sequence[str]) -> list[str]:
    """The arguments with `--peers a,b` and `--peers=a,b` as `--peers a b`, for those in `lists`."""
    found, inside = [], False
    for arg in args:
        option, equals, value = arg.partition("=")
        if option.startswith("--"):
            inside = option.replace("_", "-") in lists
            found += [option, *_parts(value)] if inside and equals else [arg]
        else:
            found += _parts(arg) if inside else [arg]
    return found


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]
