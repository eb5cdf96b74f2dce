"""The run folder of each training and seed, and what is read from those that have ended.

FOLDER/trainings/SCALE/NAME/seed-S/, or of seeds that are trained together
FOLDER/trainings/SCALE/NAME/seeds-A-B/, in which groups/0 is of seed A.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastdml.errors import InputError
from fastdml.files import write_atomically, writing
from fastdml.names import unique
from fastdml.report.metrics_log import INDEPENDENT, group_folder, to_json
from fastdml.report.summary import prolonged, read_summary
from fastdml.reproduce import groups
from fastdml.reproduce.experiment import Experiment, PeerOf, Phase, Training
from fastdml.reproduce.record import training_record
from fastdml.train.checkpoint import FREE_ON_RESUME
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import load_config, preset
from fastdml.train.run_folder import LOCK, check_new_folder, open_lock, take_lock
from fastdml.yaml_file import CONFIG

logger = logging.getLogger(__name__)

State = Literal["new", "begun", "finished"]
Key = tuple[str, int]  # a training's name, and a seed
MEASURED = "measured"  # a folder in that of a run, of what was measured on it when it had ended


@dataclass(frozen=True)
class Place:
    """Where trainings are, and what they are trained from and on."""

    folder: Path  # of all scales
    scale: str
    root: str = "data"  # of the data sets' files
    device: str = "auto"
    download: bool = False
    together: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    """The seeds of the run that trains a seed of a training, by name and seed, where these are
    several: see `groups`."""

    @property
    def trainings(self) -> Path:
        return self.folder / "trainings" / self.scale

    def training_folder(self, training: Training) -> Path:
        return self.trainings / training.name

    def results(self, experiment: Experiment) -> Path:
        return self.folder / self.scale / experiment.name

    def seeds_of_run(self, training: Training, seed: int) -> tuple[int, ...]:
        return self.together.get((training.name, seed), (seed,))

    def run_folder(self, training: Training, seed: int) -> Path:
        """That has what is said of this seed."""
        seeds = self.seeds_of_run(training, seed)
        return groups.folder_of_seed(self.training_folder(training), seeds, seed)

    def teacher(self, teacher: PeerOf, seed: int) -> str:
        """Its name in the settings of a run."""
        run = self.run_folder(teacher.training, seed)
        folder = run if teacher.phase == "mutual" else run / INDEPENDENT
        names = unique(teacher.training.settings["peers"])
        return f"{folder}:{names[teacher.peer]}"

    def config(self, training: Training, seed: int) -> TrainConfig:
        """Of the run that trains this seed."""
        seeds = self.seeds_of_run(training, seed)
        settings = groups.grouped_settings(training, len(seeds))
        data = settings.pop("data")
        if self.download and (data != "market1501" or settings.get("standin")):
            settings["download"] = True
        return preset(
            data,
            **settings,
            teachers=tuple(self.teacher(one, seed) for one in training.teachers),
            seed=seeds[0],
            root=self.root,
            device=self.device,
            folder=str(self.training_folder(training) / groups.folder_name(seeds)),
        )


def state_of(config: TrainConfig) -> State:
    """How far the training in `config.folder` is. Raises InputError where the folder holds
    something else: other files, or a run with other settings."""
    folder = Path(config.folder or "")
    remedy = "or choose another with --folder"
    if not (folder / CONFIG).is_file():
        check_new_folder(config, f"delete it, {remedy}")
        return "new"
    try:
        saved = load_config(folder / CONFIG)
    except InputError as error:
        raise InputError(f"{error}; delete {folder}, {remedy}") from None
    check_same_settings(folder, saved, config)
    own = [group_folder(folder, g) for g in range(config.groups)] * (config.groups > 1)
    summaries = [_whole_summary(path, config) for path in (folder, *own)]
    if None in summaries or prolonged(config.to_dict(), summaries[0] or {}):
        return "begun"  # a run that goes on at its end writes them again
    return "finished"


def _whole_summary(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """None where there is none, or one that does not say what is read of it, as of a file that was
    damaged."""
    try:
        summary = read_summary(folder)
        training_record("", 0, summary)
        for phase in ("mutual", INDEPENDENT)[: 1 + config.independent]:
            dict(summary[phase]["scores"])
    except (InputError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return summary


def check_same_settings(folder: Path, saved: TrainConfig, wanted: TrainConfig) -> None:
    """Raises InputError for a run whose settings are not those of the training, but for such as
    change no weight."""
    before, now = saved.to_dict(), wanted.to_dict()
    differ = [
        f"{name} is {before.get(name)!r} there and {now.get(name)!r} here"
        for name in {**now, **before}
        if name not in FREE_ON_RESUME and before.get(name) != now.get(name)
    ]
    if differ:
        raise InputError(
            f"{folder} holds another training: {', '.join(differ)}; delete that folder, or choose "
            "another with --folder"
        )


def is_locked(folder: Path) -> bool:
    """Whether another process trains in a run folder. Not for a folder in which this one does,
    whose lock would end."""
    try:
        lock = (folder / LOCK).open("rb+")
    except OSError:  # not there, or not ours to write: training will say so
        return False
    with lock:
        return not take_lock(lock.fileno())


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """In this block no other process is in such a block of the same folder of trainings: they
    measure and write one after the other. Where the file system has no locks, nobody waits."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = open_lock(folder)
    try:
        if not take_lock(lock):
            logger.info("another process writes results: waiting for it")
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@dataclass(frozen=True)
class Finished:
    """A training that has ended, of one seed. root, device: for what is measured on it."""

    training: Training
    seed: int
    folder: Path  # of the run
    root: str = "data"
    device: str = "auto"

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.folder)

    def phase_folder(self, phase: Phase) -> Path:
        return self.folder if phase == "mutual" else self.folder / INDEPENDENT

    def scores(self, phase: Phase) -> dict[str, Any]:
        """Those of the weights that the run is judged by: of each score a list, a value a peer, and
        `ensemble_NAME`."""
        best = self.summary.get("chosen_on") == "validation"
        return self.summary[phase]["best_scores" if best else "scores"]

    def measured(
        self, name: str, phase: Phase, measure: Callable[[], Any], number: Callable[[Any], float]
    ) -> float:
        """`number` of what `measure` gives, plain values, which are kept in a file of the run
        folder: the next time they are read from there. name: with all that decides the values."""
        path = self.folder / MEASURED / f"{name}-{phase}.json"
        try:
            return float(number(json.loads(path.read_text())))
        except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged
            pass
        text = to_json(measure())
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)
        return float(number(json.loads(text)))
