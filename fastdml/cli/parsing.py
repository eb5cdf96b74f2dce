"""Parsing options: an argparse whose mistakes are an InputError of one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

from fastdml.errors import InputError
from fastdml.list_options import split_lists
from fastdml.names import advice
from fastdml.paths import expanded


class Parser(argparse.ArgumentParser):
    """A subcommand's options; a mistake is an InputError, an unknown option names the nearest."""

    def __init__(self, name: str, command: Callable[[list[str]], None]) -> None:
        super().__init__(f"fastdml {name}", description=command.__doc__, allow_abbrev=False)

    def parse(self, args: list[str]) -> argparse.Namespace:
        """The options' values, in any order with what has no option. `--peers a,b` is `--peers a
        b`."""
        if _ASKED.get():
            raise _Made(self)
        check_options(args, self._option_string_actions, self.prog)
        lists = [name for a in self._actions if a.nargs == "+" for name in a.option_strings]
        return self.parse_intermixed_args(split_lists(args, lists))

    def options(self) -> list[argparse.Action]:
        """Its --options, but for --help."""
        return [a for a in self._actions if a.option_strings and "--help" not in a.option_strings]

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")


class _Made(Exception):
    """A command has made its parser, which was all that it was asked for."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


# Whether a command is to make its parser and do nothing else.
_ASKED: ContextVar[bool] = ContextVar("asked", default=False)


def parser_of(command: Callable[[list[str]], None]) -> Parser:
    """The parser of a command, which makes it and is then left."""
    token = _ASKED.set(True)
    try:
        command([])
    except _Made as made:
        return made.parser
    finally:
        _ASKED.reset(token)
    raise TypeError(f"{command} has no options of a Parser")


def check_options(args: Iterable[str], known: Iterable[str], command: str) -> None:
    """Raises InputError for an --option that is not `known`, with the nearest that is."""
    known = list(known)
    for arg in args:
        option = arg.partition("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in known:
            others = f"{command} --help lists those there are"
            raise InputError(f"unknown option {option}; {advice(option, known, others=others)}")


def as_folder(text: str) -> Path:
    """A path as people write it: the `type` of an option that names a folder."""
    try:
        return expanded(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
