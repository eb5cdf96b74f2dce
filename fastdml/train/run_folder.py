"""The folder of a run: named, made or found, used by one process at a time, never overwritten.

From its first moment a run has config.yaml, and before the first step a checkpoint. Runs without a
folder of their own are numbered below runs/.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdml.errors import InputError
from fastdml.files import NO_ROOM, partial, safe_name, writing
from fastdml.paths import expanded
from fastdml.report.metrics_log import METRICS
from fastdml.train.checkpoint_folder import whole_folders
from fastdml.train.config.base import TrainConfig
from fastdml.yaml_file import CONFIG

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last.ckpt"
INITIAL_CHECKPOINT = "initial.ckpt"  # the weights that the independent phase starts from too
BEST = "best"
LOCK = ".lock"
DEEPEST = ("x" * 60,) * 5  # a relative path at least as long as any that a run writes
ELSEWHERE = "resume it, choose another folder, or leave folder out for a new numbered one"
# Files that a process may leave that is killed before it has written its settings.
STILLBORN = {LOCK, partial(Path(CONFIG)).name}


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


def new_folder(config: TrainConfig) -> Path:
    """Makes the folder of a new run. Raises InputError where it cannot be made."""
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


def resume_folder(config: TrainConfig) -> Path:
    """The folder that `resume` means; it must hold a run. Newer folders whose process was killed
    before it wrote any settings are passed over, which is logged."""
    if config.folder is not None:
        folder = Path(config.folder)
        if not (folder / CONFIG).is_file():
            raise InputError(f"nothing to resume in {folder}: it holds no {CONFIG}")
        return folder
    folders = numbered_folders(config)
    empty: list[str] = []
    for number in sorted(folders, reverse=True):
        if (folders[number] / CONFIG).is_file():
            if empty:
                logger.info("passed over, without a %s: %s", CONFIG, ", ".join(empty))
            return folders[number]
        empty.append(str(folders[number]))
    found = f", and no {CONFIG} in {', '.join(empty)}" if empty else ""
    raise InputError(
        f"nothing to resume: no folder runs/{run_name(config)}-NNN holds a run{found}; "
        "give the run's folder, or start without resume"
    )


def needs_pretrained(config: TrainConfig) -> bool:
    """Whether peers have to begin with pretrained weights: those of a run that goes on are in its
    checkpoint, so that it needs neither a cache nor the network."""
    if not config.pretrained or not config.resume:
        return config.pretrained
    folder = resume_folder(config)
    names = (LAST_CHECKPOINT, INITIAL_CHECKPOINT)
    return not any((folder / name).exists() for name in names) and not whole_folders(folder)


def records_a_run(path: str | Path) -> bool:
    """Whether a file of settings was written by a run, not by a person."""
    file = expanded(path)
    return file.name == CONFIG and (file.parent / METRICS).exists()


def check_new_folder(config: TrainConfig, remedy: str = ELSEWHERE) -> None:
    """Refuses to begin a run where it would overwrite something, before anything is written.
    remedy: what to do then."""
    if config.folder is None:
        return
    folder = Path(config.folder)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder.joinpath(*DEEPEST))
        taken = os.path.lexists(folder) and (
            not folder.is_dir() or {p.name for p in folder.iterdir()} - STILLBORN
        )
    except OSError as error:
        raise InputError(f"cannot use the folder {folder}: {error.strerror}") from None
    if taken:
        raise InputError(f"{folder} is there already and is not overwritten: {remedy}")


class FolderInUse(InputError):
    """Another process trains in a run's folder."""


def open_lock(folder: Path) -> int:
    """Opens the file in `folder` that `take_lock` locks, for the caller to close. Raises InputError
    where it cannot be written."""
    with writing(folder):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(folder / LOCK, flags, 0o666)


def take_lock(lock: int) -> bool:
    """Locks an open file for this process until it is closed; False where another process has it.
    Where the file system has no locks, none has."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process trains in. The lock ends with its process, and is not
    inherited by forks, as a flock would be. Where the file system has none, nothing is refused."""
    lock = open_lock(folder)
    try:
        if not take_lock(lock):
            raise FolderInUse(
                f"another process is training in {folder}: wait until it ends, or choose another "
                "folder"
            )
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        name = error.filename or f"into {folder}"
        raise InputError(f"cannot write {name}: {error.strerror}: make room and resume") from error
    finally:
        os.close(lock)
