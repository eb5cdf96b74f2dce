"""Where the settings of a run come from: presets, YAML files, the command line, a run to resume.

Layers, later ones win: defaults, the data set's preset and for re-identification the recipe (or, to
resume, the run's own config.yaml), `--config file.yaml`, the command line.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_origin

from fastdml.data import dataset_names
from fastdml.errors import InputError, require
from fastdml.list_options import split_lists
from fastdml.train.config.base import TrainConfig, completed
from fastdml.train.config.fields import check_names, field_types
from fastdml.train.run_folder import records_a_run, resume_folder
from fastdml.train.tasks.task import Task, task_for
from fastdml.yaml_file import CONFIG, read_settings

DATA = "cifar100"  # the data set of a run whose file of settings names none
RESUMING = ("resume", "folder", "peers")  # settings that say which run to go on with
NARROWEST = 40  # columns: help is laid out for this many where a terminal has fewer


def load_config(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """Settings from a YAML file, over `base` (default: the preset of the data set it names). Raises
    InputError for a file that cannot be read, and for a setting that is unknown or out of range."""
    values = read_settings(path)
    where = f" in {path}"
    if base is None:
        check_names(values, task_for(values.get("data", DATA), values).settings, where)
        base = defaults_beside(values)
    else:
        check_names(values, type(base), where)
    return base.replace(**values)


def is_known(data: str) -> bool:
    """Whether `name` is a data set of fastdml's; else a run is of `fit` on the user's own data."""
    return data in dataset_names()


def config_type(data: str, names: Iterable[str] = ()) -> type[TrainConfig]:
    """The settings class for a data set. For the user's own data the names of the settings that are
    given decide."""
    return task_for(data, names).settings


def preset(data: str, **changes: Any) -> TrainConfig:
    """The defaults for a data set, with some settings changed."""
    task = task_for(data, changes)
    check_names(changes, task.settings)
    return _defaults(task, data, changes)


def defaults_beside(settings: Mapping[str, Any]) -> TrainConfig:
    """The defaults where of these settings of a run only the data set was chosen, and those that
    decide others, such as a recipe. Raises InputError for values of these that do not exist."""
    data = settings.get("data", DATA)
    task = task_for(data, settings)
    return _defaults(task, data, {n: settings[n] for n in task.choices if n in settings})


def _defaults(task: Task, data: str, changes: Mapping[str, Any]) -> TrainConfig:
    """The defaults of a data set; some settings in `changes`, such as a recipe, decide others."""
    defaults = task.preset(data, changes)
    return task.settings(**{"data": data, **defaults, **completed(changes)})


def resolve(data: str, changes: Mapping[str, Any]) -> TrainConfig:
    """Preset and changes; with `resume`, the settings of that run and changes."""
    return _base(data, changes).replace(**changes)


def _base(data: str, given: Mapping[str, Any]) -> TrainConfig:
    """The settings under those `given`: defaults or, with `resume`, the settings of that run."""
    task = task_for(data)
    known = given.keys() & field_types(task.settings).keys()
    deciding = (*task.choices, *RESUMING)
    config = preset(data, **{name: given[name] for name in deciding if name in known})
    if not config.resume:
        return config
    folder = resume_folder(config)
    config = load_config(folder / CONFIG)
    if config.data != data:
        own = not is_known(config.data)
        how = ": go on in Python, by fit(..., config.replace(resume=True))" if own else ""
        raise InputError(f"cannot resume: {folder} is a run on {config.data}, not on {data}{how}")
    return config.replace(folder=str(folder), resume=True)


def from_command_line(
    data: str, args: Sequence[str], *, prog: str = "fastdml train"
) -> TrainConfig:
    """Settings from command-line options; `--config file.yaml` and `--resume` give the defaults.

    `--config` with a run's config.yaml takes its settings except the folder, which is in use.
    Raises InputError for wrong settings, and SystemExit for wrong options and after --help.
    """
    tyro = require("tyro", "train")
    args, path = _take_config(list(args))
    args = split_lists(args, list_options(config_type(data)))
    prog = f"{prog} {data}"
    description = (
        f"Train peers on {data} with Deep Mutual Learning. --config FILE.yaml gives other "
        "defaults, and the config.yaml of a run those of another such run."
    )

    given = read_settings(path) if path else {}  # once: it may be a pipe
    check_names(given, config_type(data), f" in {path}")
    chosen = _command_line_choices(data, args)
    if path and records_a_run(path) and not {**given, **chosen}.get("resume"):
        given.pop("folder", None)
    base = _base(data, {**given, **chosen}).replace(**given)
    for name, value in completed(chosen).items():
        if name not in chosen:
            args += ["--no-flip"] if name == "flip" else [f"--{name}", str(value)]
    with _wide_enough():
        config = tyro.cli(type(base), default=base, args=args, prog=prog, description=description)
    if config.data != data:
        raise InputError(f"{prog} cannot train on data {config.data!r}: leave `data` out")
    return config


@contextmanager
def _wide_enough() -> Iterator[None]:
    """Tells tyro that the terminal is at least `NARROWEST` wide: in narrower ones it never ends."""
    given, columns = os.environ.get("COLUMNS"), shutil.get_terminal_size().columns
    os.environ["COLUMNS"] = str(max(columns, NARROWEST))
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if given is not None:
            os.environ["COLUMNS"] = given


def list_options(kind: type[TrainConfig]) -> list[str]:
    """The options that take several values."""
    hints = field_types(kind).items()
    return [f"--{name.replace('_', '-')}" for name, hint in hints if get_origin(hint) is tuple]


def _command_line_choices(data: str, args: Sequence[str]) -> dict[str, Any]:
    """The few options that defaults of others depend on, read before the full parse, which needs
    these defaults."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    parser.add_argument("--folder")
    parser.add_argument("--peers", nargs="+")
    parser.add_argument("--epochs")
    parser.add_argument("--iterations")
    parser.add_argument("--augment")
    parser.add_argument("--pad")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction)
    task = task_for(data)
    for name in task.choices:
        flag = field_types(task.settings)[name] is bool
        action = argparse.BooleanOptionalAction if flag else "store"
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, action=action)
    try:
        return vars(parser.parse_known_args(list(args))[0])
    except argparse.ArgumentError:
        return {}  # a name without its value: the full parser reports it


def _take_config(args: list[str]) -> tuple[list[str], str | None]:
    """Splits `--config FILE` off the arguments: it decides the defaults of the others."""
    path = None
    rest = []
    position = iter(args)
    for arg in position:
        if arg == "--config":
            path = next(position, None)
            if path is None:
                raise InputError("--config needs the name of a YAML file")
        elif arg.startswith("--config="):
            path = arg.removeprefix("--config=")
        else:
            rest.append(arg)
    return rest, path
