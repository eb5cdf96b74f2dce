"""Checkpoints: tensors and plain values in one file that is always whole; the rules of resuming.

A file gets its name once it is on disk (`fastdml.files`), so that a process or a machine that dies
leaves the old checkpoint or the new one. Loading never runs code from the file
(`weights_only=True`) and compares its checksums. Costs one write of the weights and the optimizer's
state.

A folder that has results and no checkpoint has lost it: going on there would train from the
beginning over them, so it is refused.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.files import NO_ROOM, Staged, partial, writing
from fastdml.parallel import RemotePeer
from fastdml.parallel.shard_files import joined
from fastdml.peer_groups import run_of
from fastdml.report.metrics_log import INDEPENDENT, METRICS, read_metrics
from fastdml.train.checkpoint_folder import (
    CHECKPOINTS,
    Hashing,
    Mark,
    mark_of,
    whole_folders,
)
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.fields import check_names
from fastdml.train.config.sources import is_known, load_config
from fastdml.train.run_folder import INITIAL_CHECKPOINT, LAST_CHECKPOINT, STILLBORN
from fastdml.train.tasks.task import task_of
from fastdml.yaml_file import CONFIG

FORMAT = 1
# Files that a process killed before the first checkpoint may leave.
UNTOUCHED = STILLBORN | {CONFIG, INITIAL_CHECKPOINT, CHECKPOINTS} | {
    partial(Path(name)).name for name in (INITIAL_CHECKPOINT, LAST_CHECKPOINT)
}  # fmt: skip

# A resumed run may change these settings: where it is, what it shows and how often it saves. None
# of them changes a weight. `device`, `execution`, `threads` and `amp` may change because the
# machine may: the precision that `amp` stands for must stay, "auto" and 0 threads take what the run
# began with, and a run repeats bit for bit on a device of the same kind.
# `teachers` says where they are; that they are the same, their digests tell.
FREE_ON_RESUME = frozenset(
    [
        "folder",
        "resume",
        "dry_run",
        "root",
        "unlabelled",
        "download",
        "teachers",
        "device",
        "execution",
        "threads",
        "amp",
        "profile",
        "mesh",
        "timeout",
        "max_restarts",
        "fsdp",
        "keep_checkpoints",
        "log_every",
        "save_every_steps",
        "save_every_minutes",
        "progress",
        "tensorboard",
        "csv",
        "wandb",
        "figures",
    ]
)
# Settings that `fit` records of its loader, beside those of the task. A loader wrapped in another
# does not show them.
SHOWN_BY_LOADER = frozenset(["pad", "flip", "augment"])
# Settings whose values, but for the first, end with the run, and what follows them.
ENDING_SCHEDULES = {
    "schedule": "learning rate",
    "kl_schedule": "kl_weight",
    "temperature_schedule": "temperature",
}
# Earlier versions of `fit` recorded the data set's defaults here, whatever the run used.
DEFAULTS_OF_FIT = frozenset(["data", "peers", "subset", "batch_size"])


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint. Raises InputError where it cannot be written."""
    kept = " (the one before it is kept)" if path.exists() else ""
    _write(path, state, kept, lambda file: file)


def save_marked(path: Path, state: dict[str, Any], kept: str = "") -> Mark:
    """Writes a file of a checkpoint and returns its mark. kept: for the message, what remains where
    that cannot be done. Raises InputError."""
    return _write(path, state, kept, Hashing).mark()


def _write(path: Path, state: dict[str, Any], kept: str, through: Callable[[BinaryIO], Any]) -> Any:
    """through: makes of the file what is written to, which is returned."""
    try:
        with Staged() as staged, staged.open(path) as file:
            written = through(file)
            torch.save({"format": FORMAT, **state}, written)
        return written
    except (OSError, RuntimeError) as error:
        cause = _origin(error)
        if not isinstance(cause, OSError):
            raise cause from None
        remedy = ": make room and resume" if cause.errno in NO_ROOM else ""
        raise InputError(
            f"cannot write the checkpoint {path}{kept}: {cause.strerror or cause}{remedy}"
        ) from None


def _origin(error: BaseException) -> BaseException:
    """The first exception in the chain: torch's writer raises a RuntimeError of its own over an
    OSError or a KeyboardInterrupt."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    return error


def load(path: Path, mark: Mark | None = None) -> dict[str, Any]:
    """The state that `save` wrote, on the host. Raises InputError for any other file.

    mark: that the file must have; without one the checksums in the file are compared.
    """
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        with opened:
            if mark is None:
                with zipfile.ZipFile(opened) as file:
                    if file.testzip():  # torch itself looks at no checksum
                        raise zipfile.BadZipFile
            elif mark_of(opened) != mark:
                raise InputError(f"{path} is damaged: its SHA-256 is not the manifest's")
            opened.seek(0)
            state = torch.load(opened, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception:  # a damaged file can raise nearly anything
        raise InputError(
            f"{path} is not a checkpoint that can be read (truncated, damaged or another program's)"
        ) from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of this version of fastdml: format {found!r}, not {FORMAT}"
        )
    return state


def load_weights(cohort: Cohort, weights: dict[str, Tensor], path: Path) -> None:
    """Puts the weights of a checkpoint, `path`, into the peers that are here, or raises
    InputError."""
    away = [f"peers.{k}." for k, peer in enumerate(cohort) if isinstance(peer, RemotePeer)]
    weights = {name: t for name, t in weights.items() if not name.startswith(tuple(away))}
    try:
        cohort.load_state_dict(joined(weights, None, cohort))
    except RuntimeError as error:  # names the tensors
        reason = " ".join(str(error).split())
        raise InputError(f"{path} was written for other peers: {reason}") from None


def save_initial(folder: Path, weights: dict[str, Tensor]) -> bool:
    """Saves what both phases start from, and a resumed run that builds its cohort otherwise;
    whether it was there already."""
    path = folder / INITIAL_CHECKPOINT
    if path.is_file():
        return True
    if not has_begun(folder):
        save(path, {"cohort": weights})
    return False


def load_initial(folder: Path, cohort: Cohort) -> None:
    """Puts what `save_initial` saved into the peers that are here."""
    path = folder / INITIAL_CHECKPOINT
    load_weights(cohort, load(path)["cohort"], path)


def has_begun(folder: Path) -> bool:
    """Whether there is a checkpoint, of either form."""
    return (folder / LAST_CHECKPOINT).exists() or bool(whole_folders(folder))


def check_resume(folder: Path, config: TrainConfig) -> None:
    """Refuses to go on with the run in `folder` where something of it is missing or does not fit
    `config`, before anything is written. Raises InputError."""
    whole = run_of(folder)
    if whole != folder and (whole / CONFIG).is_file():
        raise InputError(f"{folder} is a group of the run {whole}, which goes on as one: resume it")
    check_resumable(load_config(folder / CONFIG).to_dict(), config)
    alone = folder / INDEPENDENT
    for phase in (folder, alone):
        if _has_checkpoint(phase) and (phase / METRICS).exists():
            read_metrics(phase)  # raises now for a damaged file, not at the end of the run
    needed = config.independent and has_begun(folder)
    initial = folder / INITIAL_CHECKPOINT
    if needed and not initial.is_file() and not has_begun(alone):
        raise InputError(
            f"cannot resume {folder}: {initial.name} {_absence(initial)}, the weights that the "
            "independent phase starts from: restore it from a copy, or start a new run"
        )


def check_resumable(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuses to continue a run whose settings `saved` differ from `config` where it matters.

    `epochs` and `iterations` may change where no schedule ends with the run, so that its past does
    not depend on them: this prolongs a run. Under the cosine schedule of the learning rate, and
    where temperature or kl_weight goes to an end, the whole curve would be another.
    """
    check_names(saved, type(config), " in the checkpoint")
    wanted = config.to_dict()
    free = FREE_ON_RESUME
    if saved.get("mesh") or config.mesh:
        free |= {"accumulate"}  # which follows the mesh: see `saving.accumulate_on`
    if not is_known(config.data):
        task = task_of(config)
        free |= SHOWN_BY_LOADER | task.shown_by_loader
        if is_known(str(saved.get("data"))):
            free |= DEFAULTS_OF_FIT | task.defaults_of_fit
    absent = {  # a setting that is younger than the run
        field.name: field.default for field in dataclasses.fields(config) if field.name not in saved
    }
    for name, value in {**saved, **absent}.items():
        if name in free or wanted[name] == value:
            continue
        why = ""
        if name in ("epochs", "iterations"):
            ending = next(
                (s for s in ENDING_SCHEDULES if wanted[s] not in ("step", "constant")), ""
            )
            if not ending:
                continue
            follows = ENDING_SCHEDULES[ending]
            why = f" (with {ending} {wanted[ending]} every {follows} depends on it)"
        raise InputError(
            f"cannot resume: {name} was {value!r} and is now {wanted[name]!r}{why}; "
            f"give the old value, or start a new run in another folder"
        )


def _has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from; False where this phase has not begun."""
    path = folder / LAST_CHECKPOINT
    if path.is_file() or whole_folders(folder):
        return True
    if not os.path.lexists(folder):
        return False
    with writing(folder):
        found = {p.name for p in folder.iterdir()} - UNTOUCHED
    if not found:
        return False
    if (folder / CHECKPOINTS).is_dir() and not os.path.lexists(path):
        raise InputError(
            f"cannot resume {folder}: {CHECKPOINTS} holds no whole checkpoint, and there is "
            f"{', '.join(sorted(found))}, which starting from the "
            f"beginning would overwrite: restore {CHECKPOINTS} from a copy, or start a new run in "
            "another folder"
        )
    others = ", ".join(sorted(found - {LAST_CHECKPOINT})) or "nothing else of the run"
    raise InputError(
        f"cannot resume {folder}: {LAST_CHECKPOINT} {_absence(path)}, and there is {others}, which "
        f"starting from the beginning would overwrite: restore {LAST_CHECKPOINT} from a copy, or "
        "start a new run in another folder"
    )


def _absence(path: Path) -> str:
    if not os.path.lexists(path):
        return "is missing"
    if path.is_dir():
        return "is a directory"
    return "is not a file" if path.exists() else "is a link to nothing"
