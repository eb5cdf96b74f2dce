"""What a reproduction comes to: the numbers of its rows, read off the finished trainings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fastdml.errors import InputError
from fastdml.peer_groups import run_of
from fastdml.reproduce.experiment import Experiment, Row, Training, Value, trainings_of
from fastdml.reproduce.failures import kept_traceback
from fastdml.reproduce.provenance import commits
from fastdml.reproduce.record import Record, RowRecord, Side, TrainingRecord, training_record
from fastdml.reproduce.scales import Scale
from fastdml.reproduce.trainings import Finished, Place

logger = logging.getLogger(__name__)


class Reader:
    """Reads values of finished trainings. failures: what could not be read or trained, a line
    each."""

    def __init__(self, place: Place, seeds: Sequence[int], failed: Mapping[tuple[str, int], str]):
        self.place, self.seeds, self.failed = place, tuple(seeds), failed
        self.finished: dict[tuple[str, int], Finished] = {}
        self.failures: dict[str, None] = {}

    def record(self, experiment: Experiment, rows: Sequence[Row], scale: Scale) -> Record:
        """Without its provenance."""
        trainings = trainings_of(rows)
        return Record(
            experiment=experiment.name,
            title=experiment.title,
            place=experiment.place,
            scale=scale.name,
            changes=tuple(experiment.changes(scale)),
            seeds=self.seeds,
            rows=tuple(self._row(row) for row in rows),
            trainings=tuple(
                self._training(self._finished(training, seed))
                for training in trainings
                for seed in self.seeds
                if (training.name, seed) not in self.failed
            ),
            notes=(*experiment.notes(scale), *self._together(trainings)),
        )

    def _together(self, trainings: Sequence[Training]) -> list[str]:
        """What to know of seeds that were trained in one run."""
        names = [
            training.name
            for training in trainings
            if any(len(self.place.seeds_of_run(training, seed)) > 1 for seed in self.seeds)
        ]
        if not names:
            return []
        return [
            f"Seeds of {', '.join(names)} were trained together, as groups of peers in one run: "
            "they differ in their initial weights, and saw the images in the same order."
        ]

    def _row(self, row: Row) -> RowRecord:
        number = row.ours.number
        return RowRecord(
            row.label,
            self._side(row.baseline),
            self._side(row.ours),
            number.unit,
            number.better,
            row.series,
            row.x,
            row.x_name,
        )

    def _side(self, value: Value) -> Side:
        return Side(value.name, value.paper, tuple(self._read(value, s) for s in self.seeds))

    def _read(self, value: Value, seed: int) -> float | None:
        name = value.training.name
        if reason := self.failed.get((name, seed)):
            self.failures[f"{name}, seed {seed}: {reason}"] = None
            return None
        try:
            return value.number.read(self._finished(value.training, seed), value.phase)
        except InputError as error:
            failure = f"{name}, seed {seed}: {error}"
        except Exception as error:  # costs no other number
            run = run_of(self._finished(value.training, seed).folder)
            failure = f"{name}, seed {seed}: {kept_traceback(error, run)}"
        if failure not in self.failures:
            logger.warning(failure)
        self.failures[failure] = None
        return None

    def _finished(self, training: Training, seed: int) -> Finished:
        key = training.name, seed
        if key not in self.finished:
            folder = self.place.run_folder(training, seed)
            self.finished[key] = Finished(
                training, seed, folder, self.place.root, self.place.device
            )
        return self.finished[key]

    def _training(self, run: Finished) -> TrainingRecord:
        noted = commits(run_of(run.folder))
        return training_record(run.training.name, run.seed, run.summary, noted)
