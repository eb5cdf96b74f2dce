"""The paper's tables and figures as experiments that one call repeats.

    found = fastdml.reproduce.run("table2:resnet32+resnet32", scale="smoke", root="data")
    print(found)

Each training is a run folder below FOLDER/trainings: what has ended is not repeated, and what was
killed goes on. `EXPERIMENTS` and `SCALES` have what there is, by name.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.arguments import finite_number, listed, shown, whole_number
from fastdml.errors import InputError
from fastdml.paths import expand, expanded
from fastdml.reproduce.experiment import Experiment, trainings_of
from fastdml.reproduce.experiments import EXPERIMENTS, find_experiments
from fastdml.reproduce.scales import SCALES, Scale, find_scale
from fastdml.reproduce.trainings import Place, one_at_a_time

if TYPE_CHECKING:
    from fastdml.reproduce.record import Record

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "Reproduction", "Scale", "run", "run_all"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reproduction:
    """What an experiment came to; its text is the table."""

    record: Record  # every number, a value a seed
    folder: Path  # of the table, as Markdown and CSV, the record and the plots
    failures: tuple[str, ...] = ()  # of trainings and measurements, a line each

    def __str__(self) -> str:
        from fastdml.reproduce.tables import markdown

        return markdown(self.record)

    __repr__ = __str__


def run(name: str, **options: Any) -> Reproduction | None:
    """Repeats one experiment, NAME or NAME:ROW, with the options of `run_all`. None after a dry
    run."""
    found = run_all([name], **options)
    return found[0] if found else None


def run_all(
    names: Sequence[str],
    *,
    scale: str = "small",
    seeds: int | None = None,
    root: str | os.PathLike[str] = "data",
    folder: str | os.PathLike[str] = "reproductions",
    device: str = "auto",
    download: bool = False,
    jobs: int = 1,
    grouped: bool | None = None,
    price_per_hour: float | None = None,
    dry_run: bool = False,
    command: str | Sequence[str] | None = None,
    hint: str = "download=True",
) -> list[Reproduction]:
    """Repeats experiments, each NAME or NAME:ROW, and writes FOLDER/SCALE/NAME, in which the rows
    that are asked for replace themselves alone.

    seeds: 0, 1, ..., so many; by default the scale's. root: folder of the data sets' files. jobs:
    how many trainings at once, each in a process of its own if there is more than one. grouped:
    whether the seeds of a training are trained together, as groups of peers in one run, where they
    can be; None: on a GPU. price_per_hour: of the device, for what it would cost. dry_run:
    says what would be trained and what it would take, and trains nothing. command,
    hint: what the record says was called, and what messages say that a download is asked for by.

    A training that fails leaves its numbers out of the table, and the others go on. Raises
    InputError for names that there are not, for images that are missing, for a folder of a training
    that holds something else, and for a disk that has no room; TrainingStopped, a SystemExit, after
    a signal, when what was trained is saved.
    """
    from fastdml.devices import choose_device, device_name
    from fastdml.reproduce.earlier_rows import earlier_record, with_earlier_rows
    from fastdml.reproduce.planning import check_needs, check_places, cost_of, with_seeds_together
    from fastdml.reproduce.provenance import provenance_of
    from fastdml.reproduce.recording import Reader
    from fastdml.reproduce.results import write_results
    from fastdml.reproduce.runner import Runner, jobs_of, raising

    began = time.monotonic()
    wanted = find_scale(scale)
    names = listed("names", names, "experiments, such as ['table2']")
    chosen = [(one, one.chosen(wanted, rows)) for one, rows in find_experiments(names)]
    seeds = wanted.seeds if seeds is None else whole_number("seeds, how many from 0,", seeds, 1)
    jobs = whole_number("jobs", jobs, 1)
    if price_per_hour is not None and finite_number("price_per_hour", price_per_hour) < 0:
        raise InputError(f"price_per_hour must be 0 or more, not {price_per_hour}")
    for what, value in (("download", download), ("dry_run", dry_run), ("grouped", grouped)):
        if not isinstance(value, bool) and not (what == "grouped" and value is None):
            raise InputError(f"{what} must be True or False, not {shown(value)}")
    if command is not None and not isinstance(command, str):
        command = [str(word) for word in listed("command", command, "words")]
    numbers = range(seeds)
    place = Place(expanded(folder), scale, expand(root), device, download)
    hardware = device_name(choose_device(device))
    trainings = trainings_of([row for _, rows in chosen for row in rows])
    results = [place.results(one) for one, _ in chosen]
    check_places([place.trainings, *results], write=not dry_run)
    partial = [one for one, rows in chosen if len(rows) < len(one.rows(wanted))]
    for one in partial:
        earlier_record(place.results(one), one, wanted)  # refused before anything is trained
    with raising():
        place = with_seeds_together(place, trainings, numbers, grouped)
        planned = jobs_of(trainings, numbers, place)
        runner = Runner(planned, jobs, hint)
        logger.info(runner.plan())
        if not dry_run:
            check_needs(runner.waiting, hint)
        cost = cost_of(planned, runner.waiting, place, price_per_hour, keep=not dry_run)
    logger.info(str(cost))
    cost.check_room()
    if dry_run:
        return []
    runner.run()
    found = []
    with raising(), one_at_a_time(place.trainings):
        for experiment, rows in chosen:
            reader = Reader(place, numbers, runner.failed)
            record = reader.record(experiment, rows, wanted)
            seconds = time.monotonic() - began
            called = command or _command(names, scale, seeds=seeds, root=place.root, device=device)
            made_by = provenance_of(called, device=hardware, seconds=seconds)
            record = dataclasses.replace(record, provenance=made_by)
            where = place.results(experiment)
            if experiment in partial and (earlier := earlier_record(where, experiment, wanted)):
                record = with_earlier_rows(record, earlier, experiment, wanted)
            write_results(where, record)
            found.append(Reproduction(record, where, tuple(reader.failures)))
    return found


def _command(names: Sequence[str], scale: str, **options: int | str | None) -> list[str]:
    """The command line that does the same."""
    words = ["fastdml", "reproduce", *names, "--scale", scale]
    for name, value in options.items():
        if value not in (None, signature(run_all).parameters[name].default):
            words += [f"--{name}", str(value)]
    return words
