"""The run folder of each training and seed, and what is read from those that have ended.

FOLDER/trainings/SCALE/NAME/seed-S/
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdml.files import replacing, writing
from fastdml.report.metrics_log import INDEPENDENT, to_json
from fastdml.report.predictions import Predictions, read_predictions
from fastdml.report.summary import read_summary
from fastdml.reproduce.experiment import Phase, Training

MEASURED = "measured"  # a folder in that of a run, of what was measured on it when it had ended


@dataclass(frozen=True)
class Finished:
    """A training that has ended, of one seed. device: on which more can be measured."""

    training: Training
    seed: int
    folder: Path  # of the run
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

    def predictions(self, phase: Phase) -> Predictions | None:
        return read_predictions(self.phase_folder(phase))

    def measured(self, name: str, phase: Phase, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, plain values, which are kept in a file of the run folder: the next
        time they are read from there. name: with all that decides the values."""
        path = self.folder / MEASURED / f"{name}-{phase}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # not there, or damaged
            pass
        text = to_json(measure())
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                file.write(text.encode())
        return json.loads(text)
