"""Where the settings of a run come from: presets, YAML files, the command line, a run to resume.

Layers, later ones win: defaults, the data set's preset and for re-identification the recipe (or, to
resume, the run's own config.yaml), `--config file.yaml`, the command line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_origin

from fastdml.errors import InputError, require
from fastdml.files import safe_name
from fastdml.options import split_lists
from fastdml.paths import expanded
from fastdml.report.metrics_log import METRICS
from fastdml.train.config.base import TrainConfig, with_length
from fastdml.train.config.fields import check_names, field_types
from fastdml.train.config.reid import ReidConfig, reid_preset
from fastdml.yaml_file import CONFIG, read_settings

REID = ("market1501",)  # the data sets of re-identification
CHOICES = ("recipe", "standin")  # settings that decide the defaults of others
RESUMING = ("resume", "folder", "peers")  # that say which run to go on with
NARROWEST = 40  # columns that help is laid out for where a terminal has fewer

# What a data set changes in the defaults; names the paper does not treat get settings that suit a
# demonstration.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar100": {},
    "cifar10": {},
    "digits": {
        "peers": ("resnet8", "resnet8"),
        "pad": 1,  # of 8 pixels
        "flip": False,  # a mirrored digit is another sign
        "epochs": 20,
        "schedule": "cosine",
    },
}

# A resumed run may change these: where it is, what it shows and how often it saves. None of them
# touches a weight. `device`, `execution`, `threads` and `amp` are here because machines come and
# go; the checkpoint insists on the precision itself, "auto" and 0 threads go on with what the run
# began with, and a run repeats bit for bit on a device of the same kind.
FREE_ON_RESUME = frozenset(
    [
        "folder",
        "resume",
        "dry_run",
        "root",
        "download",
        "device",
        "execution",
        "threads",
        "amp",
        "profile",
        "log_every",
        "save_every_steps",
        "save_every_minutes",
        "progress",
        "tensorboard",
        "figures",
    ]
)


# Recorded of the data of `fit` as far as the loader shows it, which one within another does not.
SHOWN_BY_LOADER = frozenset(["pad", "flip", "erasing", "images_per_id"])
# Recorded by `fit` of earlier versions as the data set's defaults, whatever ran.
DEFAULTS_OF_FIT = frozenset(["data", "peers", "subset", "batch_size", "standin", "height", "width"])


def check_resumable(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuses to continue a run whose settings `saved` differ from `config` where it matters.

    `epochs` and `iterations` may change under the step schedule, whose past does not depend on
    them: this prolongs a run. Under the cosine schedule the whole curve would be another.
    """
    check_names(saved, type(config), " in the checkpoint")
    wanted = config.to_dict()
    free = FREE_ON_RESUME
    if not is_known(config.data):
        free |= SHOWN_BY_LOADER
        if is_known(saved.get("data")):
            free |= DEFAULTS_OF_FIT
    for name, value in saved.items():
        if name in free or wanted[name] == value:
            continue
        why = ""
        if name in ("epochs", "iterations"):
            if config.schedule == "step":
                continue
            why = f" (with schedule {config.schedule} every learning rate depends on it)"
        raise InputError(
            f"cannot resume: {name} was {value!r} and is now {wanted[name]!r}{why}; "
            f"give the old value, or start a new run in another folder"
        )


def load_config(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """Settings from a YAML file, over `base` (default: the preset of the data set it names)."""
    values = read_settings(path)
    data = base.data if base else values.get("data", "cifar100")
    check_names(values, type(base) if base else config_type(data, values), f" in {path}")
    return (base or preset(data, **_choices(values))).replace(**values)


def is_known(data: str) -> bool:
    """Whether a name means a data set of fastdml, not data of one's own that `fit` trained on."""
    return data in (*PRESETS, *REID)


def config_type(data: str, names: Container[str] = ()) -> type[TrainConfig]:
    """names: of settings that are given, which decide it for data of one's own."""
    reid = data in REID or (not is_known(data) and "recipe" in names)
    return ReidConfig if reid else TrainConfig


def preset(data: str, **changes: Any) -> TrainConfig:
    """The defaults for a data set, with some settings changed."""
    kind = config_type(data, changes)
    check_names(changes, kind)
    defaults = reid_preset(changes) if kind is ReidConfig else PRESETS.get(data, {})
    return kind(**{"data": data, **defaults, **with_length(changes)})


def _choices(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of some settings those that decide the defaults of others."""
    return {name: values[name] for name in CHOICES if name in values}


def resolve(data: str, changes: Mapping[str, Any]) -> TrainConfig:
    """Preset and changes; with `resume`, the settings of that run and changes."""
    return _base(data, changes).replace(**changes)


def _base(data: str, given: Mapping[str, Any]) -> TrainConfig:
    """What the settings not `given` are; with `resume`, those of the run that is meant."""
    known = given.keys() & field_types(config_type(data)).keys()
    config = preset(data, **{name: given[name] for name in (*CHOICES, *RESUMING) if name in known})
    if not config.resume:
        return config
    folder = resume_folder(config)
    config = load_config(folder / CONFIG)
    if config.data != data:
        how = "" if is_known(config.data) else ": go on in Python, by fit(..., resume=True)"
        raise InputError(f"cannot resume: {folder} is a run on {config.data}, not on {data}{how}")
    return config.replace(folder=str(folder), resume=True)


def from_command_line(
    data: str, args: Sequence[str], *, prog: str = "fastdml train"
) -> TrainConfig:
    """Settings from command-line options; `--config file.yaml` and `--resume` give the defaults.

    The config.yaml of a run gives another run its settings, and not its folder, which is taken.
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
    chosen = _command_line_choices(args)
    if path and _is_of_a_run(path) and not {**given, **chosen}.get("resume"):
        given.pop("folder", None)
    base = _base(data, {**given, **chosen}).replace(**given)
    length = {name: chosen[name] for name in ("epochs", "iterations") if name in chosen}
    for name, value in with_length(length).items():
        if name not in length:
            args += [f"--{name}", str(value)]
    with _wide_enough():
        config = tyro.cli(type(base), default=base, args=args, prog=prog, description=description)
    if config.data != data:
        raise InputError(f"{prog} cannot train on data {config.data!r}: leave `data` out")
    return config


def _is_of_a_run(path: str) -> bool:
    """Whether a file of settings is what a run recorded of itself."""
    file = expanded(path)
    return file.name == CONFIG and (file.parent / METRICS).exists()


@contextmanager
def _wide_enough() -> Iterator[None]:
    """Tells tyro of a terminal that it can fill: in very narrow ones it searches for ever."""
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


def _command_line_choices(args: Sequence[str]) -> dict[str, Any]:
    """What `_base` looks for in options, which are parsed in full over the defaults it decides."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    parser.add_argument("--folder")
    parser.add_argument("--peers", nargs="+")
    parser.add_argument("--recipe")
    parser.add_argument("--epochs")
    parser.add_argument("--iterations")
    parser.add_argument("--standin", action=argparse.BooleanOptionalAction)
    try:
        return vars(parser.parse_known_args(list(args))[0])
    except argparse.ArgumentError:
        return {}  # a name without its value: the whole parser says so


def run_name(config: TrainConfig) -> str:
    """DATA-PEER-PEER, safe as a folder name, or DATA-NxPEER for a cohort of one kind."""
    peers = list(config.peers)
    if len(peers) > 2 and len(set(peers)) == 1:
        peers = [f"{len(peers)}x{peers[0]}"]
    name = "-".join([config.data.partition(":")[0], *peers])  # own data: NAME, or NAME: DESCRIPTION
    return safe_name(name)


def numbered_folders(config: TrainConfig, runs: Path = Path("runs")) -> dict[int, Path]:
    """The auto-numbered folders of this data and these peers, by number."""
    prefix = run_name(config) + "-"
    found = {}
    for folder in sorted(runs.glob(prefix.replace("[", "[[]") + "*")) if runs.is_dir() else ():
        number = folder.name[len(prefix) :]
        if number.isascii() and number.isdigit():
            found[int(number)] = folder
    return found


def resume_folder(config: TrainConfig) -> Path:
    """The folder that `resume` means; it must hold a run. The newest may be one that was killed
    before it was a run: such are passed over, in a line on stderr."""
    if config.folder is not None:
        folder = Path(config.folder)
        if not (folder / CONFIG).is_file():
            raise InputError(f"nothing to resume in {folder}: it holds no {CONFIG}")
        return folder
    folders = numbered_folders(config)
    empty = []
    for number in sorted(folders, reverse=True):
        if (folders[number] / CONFIG).is_file():
            if empty:
                print(f"passed over, without a {CONFIG}: {', '.join(empty)}", file=sys.stderr)
            return folders[number]
        empty.append(str(folders[number]))
    found = f", and no {CONFIG} in {', '.join(empty)}" if empty else ""
    raise InputError(
        f"nothing to resume: no folder runs/{run_name(config)}-NNN holds a run{found}; "
        "give the run's folder, or start without resume"
    )


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
