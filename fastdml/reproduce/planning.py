"""What a reproduction plans before it trains: which seeds share a run, what all of it takes, and
whether what it needs is there."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastdml.data import load
from fastdml.devices import choose_device
from fastdml.errors import InputError, require
from fastdml.files import writing
from fastdml.reproduce.estimate import Estimate, Run, estimate, existing, measured
from fastdml.reproduce.experiment import Training
from fastdml.reproduce.groups import most_together, seeds_together
from fastdml.reproduce.runner import Job
from fastdml.reproduce.trainings import Place
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.reid import ReidConfig
from fastdml.train.tasks.reid import opened

FIRST = 1 << 14  # bytes: about what the settings of a run take


def check_places(folders: Iterable[Path], *, write: bool) -> None:
    """Raises InputError where a folder, or the one that it would be made in, is none or, with
    `write`, takes no file. Leaves nothing there."""
    for folder in folders:
        with writing(folder):
            there = existing(folder)
            if not there.is_dir():
                raise InputError(f"{there} is no folder: choose another with --folder")
            try:
                if write:
                    with tempfile.TemporaryFile(dir=there) as file:
                        file.write(bytes(FIRST))
            except OSError as error:
                error.filename = None  # that of the file, which nobody knows
                raise


def with_seeds_together(
    place: Place, trainings: Sequence[Training], seeds: Sequence[int], grouped: bool | None
) -> Place:
    """`place`, in which seeds of a training share a run as far as they can and the device has
    memory. grouped: None: on a CUDA device."""
    device = choose_device(place.device)

    def most(training: Training) -> int:
        if device.type != "cuda":
            return len(seeds)
        try:
            one = measured(Run(training.name, place.config(training, seeds[0]), False), device)
        except Exception:  # the estimate says why it cannot be measured
            return 1
        return most_together(one.memory or 0, torch.cuda.mem_get_info(device)[0])

    wanted = device.type == "cuda" if grouped is None else grouped
    together = seeds_together(trainings, seeds, place.training_folder, wanted, most)
    return dataclasses.replace(place, together=together)


def cost_of(
    jobs: Sequence[Job],
    waiting: Sequence[Job],
    place: Place,
    price_per_hour: float | None = None,
    *,
    keep: bool,
) -> Estimate:
    """Of the jobs that have not ended. keep: what was measured, for the next time."""
    runs = [
        Run(
            job.training.name,
            job.config,
            job not in waiting,
            tuple(one.training.settings["peers"][one.peer] for one in job.training.teachers),
        )
        for job in jobs
    ]
    return estimate(runs, place.trainings, place.device, price_per_hour=price_per_hour, keep=keep)


def check_needs(jobs: Sequence[Job], hint: str) -> None:
    """Imports what every run writes its files by, and opens each data set that the jobs train on,
    once. Raises InputError for what is missing or damaged, which would fail one training after the
    other."""
    if jobs:
        for package in ("yaml", "safetensors"):
            require(package, "train")
    for config in {_images(job.config): job.config for job in jobs}.values():
        if isinstance(config, ReidConfig):
            with opened(config, hint=hint):
                pass
        else:
            load(config.data, config.root, download=config.download, hint=hint)


def _images(config: TrainConfig) -> tuple[str, bool]:
    return config.data, isinstance(config, ReidConfig) and config.standin
