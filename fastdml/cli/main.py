"""The command `fastdml`: finds the subcommand, hands over, turns the user's mistakes into a line.

Exit codes: 0 done; 1 the output could not be written, or a rank of the job was lost; 2 the input is
wrong (one line on stderr, nothing written); 130 interrupted; 141 the reader of the output went
away. Anything else is a defect and keeps its traceback. A stderr that cannot be written to stops
nothing.

Subcommands import what they need when they are called, so that `fastdml --help` and a mistyped name
answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fastdml import __version__
from fastdml.cli import ranks
from fastdml.cli.bench import bench
from fastdml.cli.completion import print_completion
from fastdml.cli.config import config
from fastdml.cli.data import data
from fastdml.cli.doctor import doctor
from fastdml.cli.evaluate import evaluate
from fastdml.cli.export import export
from fastdml.cli.kernels import kernels
from fastdml.cli.models import models
from fastdml.cli.plan import plan
from fastdml.cli.predict import predict
from fastdml.cli.report import report
from fastdml.cli.reproduce import reproduce
from fastdml.cli.train import train
from fastdml.errors import InputError
from fastdml.files import NO_ROOM
from fastdml.names import advice
from fastdml.terminal import complete_streams, discard, lenient_stderr, print_anything


def completion(args: list[str]) -> None:
    """print what makes bash, zsh or fish complete this command"""
    print_completion(args, completion, COMMANDS)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "report": report,
    "reproduce": reproduce,
    "doctor": doctor,
    "bench": bench,
    "kernels": kernels,
    "plan": plan,
    "models": models,
    "data": data,
    "config": config,
    "completion": completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    complete_streams()
    print_anything()
    args = list(sys.argv[1:] if argv is None else argv)
    with lenient_stderr():
        return ranks.run(_run, args) if ranks.started() else _run(args)


def _run(args: list[str]) -> int:
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _complain(f"error: {ranks.line_of(error)}", 2)
    except KeyboardInterrupt:
        # Training itself ends by a checkpoint and its own message, unless it is asked twice.
        return _complain("interrupted", 130)
    except BrokenPipeError:
        discard(sys.stdout)  # `fastdml ... | head`: nobody reads on
        return 141
    except OSError as error:
        if error.filename is not None:
            return _complain(f"error: {error.filename}: {error.strerror}", 2)
        if error.errno not in NO_ROOM:
            raise
        discard(sys.stdout)
        return _complain(f"error: cannot write the output: {error.strerror}", 1)


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*(arg for arg in args if arg != "help"), "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"fastdml {__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise InputError(f"unknown command {args[0]!r}; {advice(args[0], [*COMMANDS, 'help'])}")
    try:
        COMMANDS[args[0]](args[1:])
    except SystemExit as stop:  # after --help, from tyro, or because a signal ended training
        code, message = stop.code or 0, getattr(stop, "message", None)
        if isinstance(code, str):  # sys.exit of somebody else's code, with a reason
            code, message = 1, code
        return _complain(message, code) if message else code
    return 0


def _help() -> str:
    from fastdml.data import dataset_names

    *names, last = dataset_names()
    commands = "\n".join(f"  {name:<10} {run.__doc__}" for name, run in COMMANDS.items())
    commands = commands.replace("DATA", f"{', '.join(names)} or {last}")
    return (
        "usage: fastdml COMMAND ...\n\n"
        "Deep Mutual Learning: peers that learn from the labels and from each other.\n\n"
        f"{commands}\n\n"
        "fastdml help COMMAND lists its options, as fastdml COMMAND --help does; fastdml --version "
        "prints the version."
    )


def _complain(message: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
    line = f"fastdml: {' '.join(message.splitlines())}"
    if not ranks.started() or ranks.speaks(line):
        print(line, file=sys.stderr)
    return code
