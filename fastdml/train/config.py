"""The settings of a training run: one frozen dataclass for Python, YAML and the command line.

Defaults are the paper's for CIFAR-100; `PRESETS` holds what other data sets change. The line below
each field is its help text on the command line. A value from anywhere passes the same checks;
an unknown key is refused with the nearest known one.

Layers, later ones win: defaults, the data set's preset (or, to resume, the run's own config.yaml),
`--config file.yaml`, the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastdml.errors import InputError, require
from fastdml.train.report import write_atomically


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    # --- data ---
    data: str = "cifar100"
    """Data set: digits, cifar10 or cifar100."""
    root: str = "data"
    """Folder of the data set's files (digits needs none)."""
    download: bool = False
    """Fetch the data set into `root` where it is missing, checked by its MD5."""
    subset: int = 0
    """Train on this many images, evenly of each class; 0 means all. Paper: all."""
    batch_size: int = 64
    """Images a step; the last short batch of an epoch is left out. Paper: 64."""
    pad: int = 4
    """Pixels of reflected border that the random crop moves in; 0 means no crop. Paper: 4."""
    flip: bool = True
    """Mirror half of the training images, at random. Paper: yes."""
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    """Where batches come from. auto: from the device's memory if they fit, else streamed."""

    # --- peers and loss ---
    peers: tuple[str, ...] = ("resnet32", "resnet32")
    """Models to train together; a name given twice is two peers with different initial weights."""
    temperature: float = 1.0
    """The peers imitate softmax(z / T); the KL term is multiplied by T squared. Paper: 1."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels. Paper: 1."""
    kl_weight: float = 1.0
    """Weight of the mean KL divergence from the other peers. Paper: 1."""
    label_smoothing: float = 0.0
    """Share of the label's probability spread over all classes, 0 to 1. Paper: 0."""
    update: Literal["simultaneous", "sequential"] = "simultaneous"
    """Together, or one by one with predictions recomputed (Algorithm 1, 2K - 1 forward passes)."""
    independent: bool = False
    """Then train the same peers without KL, same start and batches; report both runs."""

    # --- optimizer ---
    optimizer: Literal["sgd", "adam", "adamw", "apex_sgd", "apex_adam", "apex_lamb"] = "sgd"
    """One optimizer over all peers; apex_* are NVIDIA Apex's fused ones. Paper: sgd."""
    lr: float = 0.1
    """Learning rate at the start. Paper: 0.1."""
    momentum: float = 0.9
    """Momentum of sgd and apex_sgd; the first beta of the others. Paper: 0.9."""
    nesterov: bool = True
    """Nesterov momentum (sgd and apex_sgd only). Paper: yes."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters. Not stated in the paper; reproductions use 5e-4."""
    epochs: int = 200
    """Passes over the training images. Paper: 200."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate: dropped in steps, or half a cosine to 0 over all epochs. Paper: step."""
    lr_drop_every: int = 60
    """Epochs between two drops (step schedule). Paper: 60."""
    lr_drop_factor: float = 0.1
    """What a drop multiplies the learning rate by (step schedule). Paper: 0.1."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0, fractions allowed. Paper: 0."""
    grad_clip: float = 0.0
    """Largest norm of one peer's gradient; 0 means no clipping. Paper: 0."""
    accumulate: int = 1
    """Equal parts that each batch is computed in, to use less memory. Paper: 1."""
    ema: float = 0.0
    """Decay of averaged weights, which are then what is evaluated and saved; 0: none. Paper: 0."""

    # --- speed ---
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:N."""
    execution: Literal["auto", "eager", "streams", "graph", "stacked"] = "auto"
    """How a step runs. auto: on a GPU the fastest by a short measurement, on a CPU by a rule."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of the peers. auto: bf16 if the hardware has it, fp16 on older CUDA, else off."""
    compile: bool = False
    """Compile the peers with torch.compile (minutes at the start, faster steps)."""
    profile: bool = False
    """Record ten steps: trace.json (for Chrome) and profile.txt, in the run's folder."""

    # --- reproducibility ---
    seed: int = 0
    """Fixes initial weights, order and augmentation."""
    deterministic: bool = False
    """Deterministic algorithms only: CUDA runs repeat bit for bit (CPU runs always do); slower."""

    # --- the run ---
    folder: str | None = None
    """Folder of the run, made anew. Default: runs/DATA-PEERS-NNN, the next free number."""
    resume: bool = False
    """Go on, bit for bit, with the run in `folder` (default: the newest of these peers)."""
    dry_run: bool = False
    """Build everything, run one step, print what would happen, write nothing."""
    eval_every: int = 1
    """Epochs between two evaluations on the test images; the last epoch always has one."""
    log_every: int = 50
    """Steps between two readings of the losses (each waits for the device); 0: once an epoch."""
    save_every_steps: int = 0
    """Steps between two checkpoints; 0: none by count. Every epoch ends with one anyway."""
    save_every_minutes: float = 10.0
    """Minutes between two checkpoints; 0: none by time."""
    progress: bool = False
    """Show the progress bar even where the output is not a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""

    def __post_init__(self) -> None:
        for name, hint in _field_types().items():
            value = _convert(name, getattr(self, name), hint)
            object.__setattr__(self, name, value)
            if name in _LIMITS:
                accepts, meaning = _LIMITS[name]
                if not accepts(value):
                    raise InputError(f"{name} must be {meaning}, not {value!r}")
        if not self.peers:
            raise InputError("peers is empty: name at least one model, for instance resnet32")
        if self.optimizer in ("sgd", "apex_sgd") and self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs momentum above 0: set momentum, or nesterov to false")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate "
                f"({self.accumulate})"
            )
        if self.accumulate > 1 and self.update == "sequential":
            raise InputError("accumulate above 1 needs update simultaneous, not sequential")
        if self.warmup_epochs > self.epochs:
            raise InputError(
                f"warmup_epochs ({self.warmup_epochs:g}) must not exceed epochs ({self.epochs})"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and checkpoints hold them."""
        values = dataclasses.asdict(self)
        return {**values, "peers": list(self.peers)}

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed; unknown ones are refused by name."""
        check_names(changes)
        return dataclasses.replace(self, **changes)

    def save(self, path: Path) -> None:
        yaml = require("yaml", "train")
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


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

_POSITIVE = (lambda x: x > 0, "above 0")
_COUNT = (lambda x: x >= 1, "1 or more")
_NOT_NEGATIVE = (lambda x: x >= 0, "0 or more")
_FRACTION = (lambda x: 0 <= x <= 1, "within 0..1")
_LIMITS = {
    "subset": _NOT_NEGATIVE,
    "batch_size": _COUNT,
    "pad": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "ce_weight": _NOT_NEGATIVE,
    "kl_weight": _NOT_NEGATIVE,
    "label_smoothing": _FRACTION,
    "lr": _POSITIVE,
    "momentum": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "weight_decay": _NOT_NEGATIVE,
    "epochs": _COUNT,
    "lr_drop_every": _COUNT,
    "lr_drop_factor": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "warmup_epochs": _NOT_NEGATIVE,
    "grad_clip": _NOT_NEGATIVE,
    "accumulate": _COUNT,
    "ema": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "seed": (lambda x: 0 <= x < 2**63, "within 0..2**63-1"),
    "eval_every": _COUNT,
    "log_every": _NOT_NEGATIVE,
    "save_every_steps": _NOT_NEGATIVE,
    "save_every_minutes": _NOT_NEGATIVE,
}

# A resumed run may change these: where it is, what it shows and how often it saves. None of them
# touches a weight. `device`, `execution` and `amp` are here because machines come and go; the
# checkpoint insists on the precision itself, "auto" goes on with the execution that the run began
# with, and a run repeats bit for bit on a device of the same kind.
FREE_ON_RESUME = frozenset(
    [
        "folder",
        "resume",
        "dry_run",
        "root",
        "download",
        "device",
        "execution",
        "amp",
        "profile",
        "log_every",
        "save_every_steps",
        "save_every_minutes",
        "progress",
        "tensorboard",
    ]
)


def check_names(names: Mapping[str, Any], where: str = "") -> None:
    """Refuses names that are no setting, with the nearest that is."""
    known = list(_field_types())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known)}"
            raise InputError(f"unknown setting {name!r}{where}; {hint}")


def check_resumable(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuses to continue a run whose settings `saved` differ from `config` where it matters.

    `epochs` may change under the step schedule, whose past does not depend on it: this prolongs
    a run. Under the cosine schedule the whole curve would be another.
    """
    check_names(saved, " in the checkpoint")
    wanted = config.to_dict()
    for name, value in saved.items():
        if name in FREE_ON_RESUME or wanted[name] == value:
            continue
        if name == "epochs" and config.schedule == "step":
            continue
        raise InputError(
            f"cannot resume: {name} was {value!r} and is now {wanted[name]!r}; "
            f"give the old value, or start a new run in another folder"
        )


def load_config(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """Settings from a YAML file, over `base` (default: the preset of the data set it names)."""
    yaml = require("yaml", "train")
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"cannot read the settings {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold 'name: value' lines, not a {type(values).__name__}")
    check_names(values, f" in {path}")
    if base is None:
        base = preset(values.get("data", "cifar100"))
    return base.replace(**values)


def preset(data: str, **changes: Any) -> TrainConfig:
    """The defaults for a data set, with some settings changed."""
    check_names(changes)
    return TrainConfig(**{"data": data, **PRESETS.get(data, {}), **changes})


def resolve(data: str, changes: Mapping[str, Any]) -> TrainConfig:
    """Preset and changes; with `resume`, the settings of that run and changes."""
    config = preset(data, **changes)
    if config.resume:
        folder = resume_folder(config)
        config = load_config(folder / "config.yaml").replace(
            **{**changes, "folder": str(folder), "resume": True}
        )
        if config.data != data:
            raise InputError(f"cannot resume: {folder} is a run on {config.data}, not on {data}")
    return config


def from_command_line(
    data: str, args: Sequence[str], *, prog: str = "fastdml train"
) -> TrainConfig:
    """Settings from command-line options; `--config file.yaml` and `--resume` give the defaults."""
    tyro = require("tyro", "train")
    args, path = _take_config(list(args))
    prog = f"{prog} {data}"
    description = (
        f"Train peers on {data} with Deep Mutual Learning. --config FILE.yaml gives other defaults."
    )

    def parse(base: TrainConfig) -> TrainConfig:
        return tyro.cli(TrainConfig, default=base, args=args, prog=prog, description=description)

    def layered(base: TrainConfig) -> TrainConfig:
        return load_config(path, base) if path else base

    config = parse(layered(preset(data)))
    if config.resume:
        folder = resume_folder(config)
        base = load_config(folder / "config.yaml").replace(folder=str(folder), resume=True)
        config = parse(layered(base))
    if config.data != data:
        raise InputError(f"{prog} cannot train on data {config.data!r}: leave `data` out")
    return config


def run_name(config: TrainConfig) -> str:
    """DATA-PEER-PEER, safe as a folder name, or DATA-NxPEER for a cohort of one kind."""
    peers = list(config.peers)
    if len(peers) > 2 and len(set(peers)) == 1:
        peers = [f"{len(peers)}x{peers[0]}"]
    name = "-".join([config.data, *peers])
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:100]


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
    """The folder that `resume` means; it must hold a run."""
    if config.folder is not None:
        folder = Path(config.folder)
    else:
        folders = numbered_folders(config)
        if not folders:
            raise InputError(
                f"nothing to resume: no folder runs/{run_name(config)}-NNN; "
                "give the run's folder, or start without resume"
            )
        folder = folders[max(folders)]
    if not (folder / "config.yaml").is_file():
        raise InputError(f"nothing to resume in {folder}: it holds no config.yaml")
    return folder


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


@cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, without guessing: 64.0 is an int, "1e-3" a float, 1 no bool."""
    if NoneType in get_args(hint):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value is False and "off" in choices:
            return "off"  # YAML 1.1 reads a bare `off` as false
        if value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(f"{name} must be a list of names, not {value!r}")
        return tuple(_convert(name, item, str) for item in value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (hint is float or number.is_integer()):
            return hint(number)
    kinds = {bool: "true or false", str: "text", int: "a whole number", float: "a finite number"}
    raise InputError(f"{name} must be {kinds[hint]}, not {value!r}")
