"""Trains what a reproduction needs: what has ended is left, what has begun goes on.

One training after the other in this process, or several at once in processes of their own. One that
fails costs those that learn from it and no others. A folder that another process trains in is left
to that process until nothing else is to be done, and then waited for: two reproductions into one
folder share the work.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fastdml.errors import InputError
from fastdml.notebook import without_advice_to_exit
from fastdml.reproduce.child import Child, Ended, train_here
from fastdml.reproduce.experiment import Training
from fastdml.reproduce.trainings import Key, Place, is_locked, state_of
from fastdml.train.config.base import TrainConfig
from fastdml.train.stopping import STOPPING, TrainingStopped
from fastdml.yaml_file import CONFIG

logger = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at processes of ours
PATIENCE = 5.0  # seconds between two looks at folders of others


@dataclass(frozen=True)
class Job:
    """A run: of a training one seed, or several that are trained together."""

    training: Training
    seed: int  # the first
    config: TrainConfig

    @property
    def key(self) -> Key:
        return self.training.name, self.seed

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.config.groups)

    @property
    def keys(self) -> list[Key]:
        """Of all its seeds."""
        return [(self.training.name, seed) for seed in self.seeds]

    @property
    def needs(self) -> list[Key]:
        """Those whose peers teach."""
        return [(one.training.name, self.seed) for one in self.training.teachers]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.folder))

    def __str__(self) -> str:
        return _named(self.training.name, self.seeds)


def jobs_of(trainings: Sequence[Training], seeds: Sequence[int], place: Place) -> list[Job]:
    """All seeds of all trainings, seed after seed, so that an early end leaves whole seeds."""
    runs: dict[tuple[str, tuple[int, ...]], Job] = {}
    for seed in seeds:
        for training in trainings:
            own = place.seeds_of_run(training, seed)
            if (training.name, own) not in runs:
                job = Job(training, own[0], place.config(training, seed))
                runs[training.name, own] = job
    return [*runs.values()]


class Runner:
    """Trains jobs, at most `at_once` of them at a time. `failed`: why one has not ended. Raises
    InputError, before anything is trained, for a folder that holds something else."""

    def __init__(self, jobs: Sequence[Job], at_once: int, hint: str) -> None:
        self.at_once, self.hint = at_once, hint
        self.count = sum(len(job.keys) for job in jobs)
        ended = [job for job in jobs if state_of(job.config) == "finished"]
        self.finished = {key for job in ended for key in job.keys}
        self.waiting = [job for job in jobs if job not in ended]
        self.failed: dict[Key, str] = {}
        self.running: dict[Key, tuple[Job, Child]] = {}
        self.left_to_others: set[Key] = set()

    def plan(self) -> str:
        """What there is to do."""
        begun = [job for job in self.waiting if (job.folder / CONFIG).is_file()]
        new = [job for job in self.waiting if job not in begun]
        ended = len(self.finished)
        parts = [f"{self.count} training{'s' * (self.count > 1)}: {ended} ended"]
        parts += [f"{len(begun)} to go on with ({_listed(begun)})"] if begun else []
        parts += [f"{len(new)} to begin ({_listed(new)})"] if new else []
        return ", ".join(parts)

    def run(self) -> None:
        """Raises TrainingStopped after SIGINT, SIGTERM or SIGHUP, when all that train have saved
        their state."""
        try:
            with raising():
                while self.waiting or self.running:
                    if not self._go_on() and (self.waiting or self.running):
                        time.sleep(POLL if self.running else PATIENCE)
        except TrainingStopped as stopped:
            number = int(stopped.code or 0) - 128
            self._end_children(number)
            done = f"{len(self.finished)} of {self.count} trainings have ended, and "
            raise TrainingStopped(number, _stopped(number, done)) from None
        except BaseException:
            self._end_children(signal.SIGTERM)
            raise

    def _go_on(self) -> bool:
        """Starts what can be started and looks after what runs; whether anything changed."""
        ended = [key for key, (_, child) in self.running.items() if child.ended]
        for key in ended:
            job, child = self.running.pop(key)
            self._conclude(job, child.result())
        following = self._next() if len(self.running) < self.at_once else None
        if following is not None:
            self._start(following)
        return bool(ended) or following is not None

    def _next(self) -> Job | None:
        """The first job whose teachers are trained and in whose folder nobody else trains."""
        for job in list(self.waiting):
            lost = [key for key in job.needs if key in self.failed]
            if lost:
                self.waiting.remove(job)
                why = f"its teacher, {lost[0][0]}, has not been trained"
                self.failed |= dict.fromkeys(job.keys, why)
            elif all(key in self.finished for key in job.needs):
                if not is_locked(job.folder):
                    self.waiting.remove(job)
                    return job
                self._leave(job)
        return None

    def _leave(self, job: Job) -> None:
        """To the process that trains it. Told once."""
        if job.key not in self.left_to_others:
            self.left_to_others.add(job.key)
            logger.info(f"{job}: another process trains it, in {job.config.folder}")

    def _start(self, job: Job) -> None:
        try:
            state = state_of(job.config)
        except InputError as error:
            self._conclude(job, Ended(str(error)))
            return
        if state == "finished":  # by another process
            self.finished |= set(job.keys)
            return
        done = len(self.finished) + len(self.failed) + len(self.running)
        what = "goes on" if state == "begun" else "begins"
        where = f"in {job.config.folder}"
        if self.at_once > 1:
            where += f"; its progress is in {job.config.folder}.log"
        logger.info(f"{job} {what} ({done + 1} of {self.count}), {where}")
        config = job.config.replace(resume=state == "begun")
        if self.at_once == 1:
            self._conclude(job, train_here(config, self.hint))
            return
        try:
            self.running[job.key] = job, Child(config, self.hint, self.at_once)
        except InputError as error:  # no room for what it says
            self._conclude(job, Ended(str(error)))

    def _conclude(self, job: Job, ended: Ended) -> None:
        if ended.failure is None:
            self.finished |= set(job.keys)
            if self.at_once > 1:
                logger.info(f"{job} has ended")
            return
        if ended.busy or is_locked(job.folder):  # another process was a moment faster
            self.waiting.append(job)
            self._leave(job)
            return
        logger.warning(f"{job} has failed: {ended.failure}")
        self.failed |= dict.fromkeys(job.keys, ended.failure)

    def _end_children(self, number: int) -> None:
        """Lets all save their state and end; a signal meanwhile ends the waiting."""
        for _, child in self.running.values():
            child.stop(number)
        for _, child in self.running.values():
            child.result()


def _listed(jobs: Sequence[Job]) -> str:
    """Each training, with its seeds."""
    seeds: dict[str, list[int]] = {}
    for job in jobs:
        seeds.setdefault(job.training.name, []).extend(job.seeds)
    return "; ".join(_named(name, each) for name, each in seeds.items())


def _named(name: str, seeds: Sequence[int]) -> str:
    return f"{name}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"


@contextmanager
def raising() -> Iterator[None]:
    """In this block SIGINT, SIGTERM and SIGHUP raise TrainingStopped wherever the program is, but
    within a training, which hears them itself and saves its state first. Ignored ones stay so."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        without_advice_to_exit()
        raise TrainingStopped(number, _stopped(number, ""))

    try:
        before = {number: signal.signal(number, stop) for number in STOPPING if _heard(number)}
    except ValueError:  # only the main thread may listen
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int, done: str) -> str:
    return (
        f"stopped by {signal.Signals(number).name}: {done}all that was trained is saved; the same "
        "command goes on"
    )


def _heard(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN
