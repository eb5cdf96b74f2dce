"""The folder of a run: made or found, used by one process at a time, and never overwritten.

From its first moment a run has config.yaml, and before the first step last.ckpt. A folder that has
results and no checkpoint has therefore lost it, and going on there would train from the beginning
over them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdml.errors import InputError
from fastdml.files import NO_ROOM, partial, writing
from fastdml.report.metrics_log import INDEPENDENT, METRICS, read_metrics
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import (
    check_resumable,
    load_config,
    numbered_folders,
    resume_folder,
    run_name,
)
from fastdml.yaml_file import CONFIG

LAST_CHECKPOINT = "last.ckpt"
INITIAL_CHECKPOINT = "initial.ckpt"
BEST = "best"
LOCK = ".lock"
DEEPEST = ("x" * 60,) * 5  # a path below the folder as long as any of a run's
# What a process leaves that is killed before its run is one: no settings yet.
STILLBORN = {LOCK, partial(Path(CONFIG)).name}
# What it leaves that is killed before the first checkpoint.
UNTOUCHED = STILLBORN | {CONFIG, INITIAL_CHECKPOINT} | {
    partial(Path(name)).name for name in (INITIAL_CHECKPOINT, LAST_CHECKPOINT)
}  # fmt: skip


def open_folder(config: TrainConfig) -> Path:
    """The run's folder: a new one, or with `resume` the one to go on in."""
    check_folder(config)
    if config.resume:
        return resume_folder(config)
    while True:
        number = max(numbered_folders(config), default=0) + 1
        folder = Path(config.folder or f"runs/{run_name(config)}-{number:03d}")
        try:
            folder.mkdir(parents=True, exist_ok=config.folder is not None)
        except OSError as error:
            if isinstance(error, FileExistsError) and config.folder is None:
                continue  # another run took the number just now
            raise InputError(f"cannot make the run's folder {folder}: {error.strerror}") from None
        return folder


def check_folder(config: TrainConfig) -> None:
    """Refuses what would overwrite something, before anything is written."""
    if not config.resume:
        if config.folder is not None:
            _refuse_overwriting(Path(config.folder))
        return
    folder = resume_folder(config)
    check_resumable(load_config(folder / CONFIG).to_dict(), config)
    alone = folder / INDEPENDENT
    for phase in (folder, alone):
        if _has_checkpoint(phase) and (phase / METRICS).exists():
            read_metrics(phase)  # says what is wrong with it, which the end would find out
    needed = config.independent and (folder / LAST_CHECKPOINT).is_file()
    initial = folder / INITIAL_CHECKPOINT
    if needed and not initial.is_file() and not (alone / LAST_CHECKPOINT).is_file():
        raise InputError(
            f"cannot resume {folder}: {initial.name} {_absence(initial)}, the weights that the "
            "independent phase starts from: restore it from a copy, or start a new run"
        )


def _refuse_overwriting(folder: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder.joinpath(*DEEPEST))
        taken = os.path.lexists(folder) and (
            not folder.is_dir() or {p.name for p in folder.iterdir()} - STILLBORN
        )
    except OSError as error:
        raise InputError(f"cannot use the folder {folder}: {error.strerror}") from None
    if taken:
        raise InputError(
            f"{folder} is there already and is not overwritten: resume it, choose another folder, "
            "or leave folder out for a new numbered one"
        )


def _has_checkpoint(folder: Path) -> bool:
    """Whether to go on from one; False where the folder's phase has not begun."""
    path = folder / LAST_CHECKPOINT
    if path.is_file():
        return True
    if not os.path.lexists(folder):
        return False
    with writing(folder):
        found = {p.name for p in folder.iterdir()} - UNTOUCHED
    if not found:
        return False
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


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process trains in. The lock ends with its process, and is not
    inherited by forks, as a flock would be. Where the file system has none, nothing is refused."""
    with writing(folder):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InputError(
                    f"another process is training in {folder}: wait until it ends, or choose "
                    "another folder"
                ) from None
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        name = error.filename or f"into {folder}"
        raise InputError(f"cannot write {name}: {error.strerror}: make room and resume") from error
    finally:
        os.close(lock)
