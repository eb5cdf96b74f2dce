"""Which seeds of a training are trained together, as groups of the peers of one run.

One run of several seeds gives work to a GPU that one cohort does not fill. The groups see the same
batches: such seeds differ in their initial weights alone. A training whose seed also chooses images
(fewer labels, a subset, validation images), or with teachers, which are other ones for each seed,
has a run a seed, and so have peers of re-identification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdml.errors import InputError
from fastdml.report.metrics_log import group_folder
from fastdml.reproduce.experiment import Training
from fastdml.train.config.sources import preset
from fastdml.yaml_file import CONFIG

FILLED = 0.8  # of the device's free memory, at most


def can_be_grouped(training: Training) -> bool:
    """Whether seeds of a training can be groups of one run."""
    if training.teachers:
        return False
    try:
        preset(**grouped_settings(training, 2))
    except InputError:
        return False
    return True


def grouped_settings(training: Training, groups: int) -> dict[str, Any]:
    """The settings of a run of so many seeds; the training's own of one."""
    if groups == 1:
        return {**training.settings}
    peers = tuple(training.settings["peers"]) * groups
    return {**training.settings, "peers": peers, "groups": groups}


def folder_name(seeds: Sequence[int]) -> str:
    """Of the run of consecutive seeds, within the training's folder."""
    return f"seed-{seeds[0]}" if len(seeds) == 1 else f"seeds-{seeds[0]}-{seeds[-1]}"


def seeds_of_run(folder: Path, seed: int) -> tuple[int, ...] | None:
    """The seeds of the run that has begun in a training's folder and trains this seed; None where
    there is none."""
    if (folder / folder_name([seed]) / CONFIG).is_file():
        return (seed,)
    for path in sorted(folder.glob("seeds-*-*")):
        found = re.fullmatch(r"seeds-(\d+)-(\d+)", path.name)
        if found is None or not (path / CONFIG).is_file():
            continue
        first, last = map(int, found.groups())
        if first <= seed <= last:
            return tuple(range(first, last + 1))
    return None


def folder_of_seed(folder: Path, seeds: Sequence[int], seed: int) -> Path:
    """Where the run of these seeds has what it says of one of them, as a run folder."""
    run = folder / folder_name(seeds)
    return run if len(seeds) == 1 else group_folder(run, seed - seeds[0])


def runs_of(seeds: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Seeds in runs of consecutive ones, at most so many in each and as even as can be."""
    blocks: list[list[int]] = []
    for seed in seeds:
        if blocks and seed == blocks[-1][-1] + 1:
            blocks[-1].append(seed)
        else:
            blocks.append([seed])
    found = []
    for block in blocks:
        count = -(-len(block) // max(most, 1))
        bounds = [round(i * len(block) / count) for i in range(count + 1)]
        found += [tuple(block[bounds[i] : bounds[i + 1]]) for i in range(count)]
    return found


def seeds_together(
    trainings: Sequence[Training],
    seeds: Sequence[int],
    folder_of: Callable[[Training], Path],
    grouped: bool,
    most: Callable[[Training], int],
) -> dict[tuple[str, int], tuple[int, ...]]:
    """The seeds of the run that trains each seed of each training, where these are several. What
    has begun stays as it is. grouped: whether new seeds are to be trained together. most: how many
    of a training at most, asked where there are several."""
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    for training in trainings:
        new = []
        for seed in seeds:
            run = seeds_of_run(folder_of(training), seed)
            if run is None:
                new.append(seed)
            elif len(run) > 1:
                found[training.name, seed] = run
        if grouped and len(new) > 1 and can_be_grouped(training):
            for run in runs_of(new, most(training)):
                found |= {(training.name, seed): run for seed in run if len(run) > 1}
    return found


def most_together(bytes_of_one: float, free: float) -> int:
    """Seeds that a device with so many free bytes trains together, where one takes so many."""
    return max(1, int(FILLED * free // max(bytes_of_one, 1)))
