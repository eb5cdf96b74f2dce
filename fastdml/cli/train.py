"""`fastdml train`: peers trained together, into a run folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastdml.cli import ranks
from fastdml.cli.parsing import check_options
from fastdml.cli.runs import find_own_models
from fastdml.errors import InputError
from fastdml.names import advice

if TYPE_CHECKING:
    from fastdml.train import TrainConfig

# What tyro passes on of Python's int() and float().
NO_NUMBER = re.compile(
    r"Error parsing (--[\w-]+): (?:invalid literal for (int)\(\) with base 10|"
    r"could not convert string to float): (.+)"
)


def train(args: list[str]) -> None:
    """train peers together on DATA"""
    from fastdml.data import dataset_names

    known = dataset_names()
    usage = f"usage: fastdml train {{{','.join(known)}}} [OPTIONS]"
    if not args or args[0] in ("-h", "--help"):
        print(f"{usage}\n\nThe options of each: fastdml train {known[0]} --help")
        return
    data, *options = args
    if data not in known:
        own = f"images of your own: fastdml train folder --root {shlex.quote(data)}"
        what = own if Path(data).exists() else advice(data, known)
        raise InputError(f"cannot train on {data!r}; {what}")
    config = train_config(data, options)
    find_own_models(config.peers)
    if config.mesh and not ranks.started() and (code := _launched(config, args)) is not None:
        raise SystemExit(code)

    from fastdml.report.summary import read_summary
    from fastdml.report.tables import summary_table
    from fastdml.train import run
    from fastdml.train.tasks.task import scoring_of

    command = shlex.join(["fastdml", "train", *args])
    result = run(config, hint="--download", command=command)
    if result is not None and ranks.lead():  # None after a dry run, which has said its part
        summary = read_summary(result.folder)
        table = summary_table(summary, scoring_of(summary["mutual"]["scores"]))
        print(f"\n{table}\n{result.device}; run folder: {result.folder}")


def _launched(config: TrainConfig, args: list[str]) -> int | None:
    """Starts the ranks of a mesh on this machine, and returns the exit code of the job; None where
    one rank is enough, which is this process."""
    from fastdml.parallel import launch
    from fastdml.parallel.placement import place

    sizes = config.mesh_sizes
    count = sizes.processes if sizes else launch.ranks_here(config.device, len(config.peers))
    if sizes:
        place(len(config.peers), sizes.peer)  # refuses more rows than peers
    launch.check_devices(config.device, count, config.mesh)
    if count == 1:
        return None
    command = [sys.executable, "-m", "fastdml", "train", *args]
    return launch.launch(command, count, config.max_restarts, config.timeout)


def train_config(data: str, options: list[str]) -> TrainConfig:
    """The settings that options for `data` give. Raises InputError for what is wrong in them, and
    SystemExit after --help."""
    from dataclasses import fields

    from fastdml.train.config.sources import config_type, from_command_line

    settings = fields(config_type(data))
    names = [field.name.replace("_", "-") for field in settings]
    flags = [f"--no-{field.name.replace('_', '-')}" for field in settings if field.type == "bool"]
    known = ["--help", "--config", *(f"--{name}" for name in names), *flags]
    check_options(options, known, f"fastdml train {data}")
    if os.environ.get("NO_COLOR"):  # tyro does not look at it
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return from_command_line(data, options)
    except SystemExit as stop:
        # tyro puts the message of a value's check in a box; the message alone is enough.
        cause = stop.__cause__ or stop.__context__
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        if not stop.code:  # after --help
            raise
        raise InputError(
            f"{_unframed(shown.getvalue())}; fastdml train {data} --help lists the options"
        ) from None


def _unframed(box: str) -> str:
    """The first paragraph in one of tyro's boxes, in one line, without the title above it."""
    paragraph: list[str] = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]:
        text = line.strip("│ ")
        if text.strip("╰─╯-"):
            paragraph.append(text)
        elif paragraph:  # the rule below it
            break
    text = " ".join(paragraph).rstrip(".") or "wrong options"
    number = NO_NUMBER.search(text)
    if not number:
        return text
    option, whole, value = number.groups()
    return f"{option} must be {'a whole number' if whole else 'a number'}, not {value}"
