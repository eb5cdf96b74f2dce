"""One training, in this process or in one of its own, which outlives neither its parent nor a
signal to it: then it saves its state and ends."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdml import host
from fastdml.errors import InputError
from fastdml.files import writing
from fastdml.reproduce.failures import kept_traceback, log_of
from fastdml.reproduce.provenance import note_commit
from fastdml.terminal import complete_streams
from fastdml.train.callbacks import Callback, EpochStartEvent
from fastdml.train.checkpoint import has_begun
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import preset
from fastdml.train.run import run
from fastdml.train.run_folder import FolderInUse
from fastdml.train.stopping import TrainingStopped

# The child finds the packages that this process finds, whatever it was started by.
CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastdml.reproduce.child import serve; sys.exit(serve())"
)
FAILED, BUSY = 2, 3  # exit codes
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


@dataclass(frozen=True)
class Ended:
    failure: str | None = None  # one line; None: it is trained
    busy: bool = False  # since another process trains it


class NotesCommit(Callback):
    """Notes the code's commit in a new run's folder, once its first checkpoint is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_epoch_start(self, event: EpochStartEvent) -> None:
        if event.epoch == 0:
            note_commit(self.folder)


def train_here(config: TrainConfig, hint: str) -> Ended:
    """Raises TrainingStopped after a signal. Of an error that is not foreseen the traceback goes to
    a file beside the run folder."""
    folder = Path(str(config.folder))
    try:
        if config.resume and has_begun(folder):  # else this is noted once there is a checkpoint
            note_commit(folder)
        run(config, hint=hint, command="fastdml.reproduce", callbacks=[NotesCommit(folder)])
    except InputError as error:
        return Ended(" ".join(str(error).split()), isinstance(error, FolderInUse))
    except Exception as error:
        return Ended(kept_traceback(error, folder))
    return Ended()


class Child:
    """A training in a process of its own. What it says goes to a file beside the run folder."""

    def __init__(self, config: TrainConfig, hint: str, at_once: int) -> None:
        folder = Path(str(config.folder))
        self.log = log_of(folder)
        environment = {**os.environ}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, host.cpus() // at_once)))
        wanted = {"settings": config.to_dict(), "hint": hint, "parent": os.getpid()}
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", CODE, json.dumps(sys.path), json.dumps(wanted)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # the terminal's Ctrl-C reaches it through its parent
                )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self, number: int) -> None:
        self.process.send_signal(number)

    def result(self) -> Ended:
        """Waits for its end."""
        code = self.process.wait()
        if code == 0:
            return Ended()
        if code < 0:
            return Ended(f"killed by {signal.Signals(-code).name}; {self.log} has what it said")
        said = self.log.read_text(errors="replace").strip().splitlines()
        last = said[-1].strip()[:500] if said else f"exit code {code}"
        known = code in (FAILED, BUSY)
        return Ended(last if known else f"{last}; {self.log} has all of it", code == BUSY)


def serve() -> int:
    """The child's side."""
    complete_streams()
    _end_with_parent()
    wanted: dict[str, Any] = json.loads(sys.argv[2])
    if os.getppid() != wanted["parent"]:  # it ended before it could be asked to tell
        return 128 + signal.SIGTERM
    settings = wanted["settings"]
    try:
        ended = train_here(preset(settings.pop("data"), **settings), wanted["hint"])
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return int(stopped.code or FAILED)
    if ended.failure is not None:
        print(ended.failure, file=sys.stderr, flush=True)
        return BUSY if ended.busy else FAILED
    return 0


def _end_with_parent() -> None:
    """Asks for SIGTERM when the parent ends, which Linux alone offers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
