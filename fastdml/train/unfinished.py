"""The peers of a run that has not ended, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.image_record import FIELDS
from fastdml.train.checkpoint_reading import read_newest

ENTRIES = {  # of a checkpoint that are used here
    "description": dict,
    "cohort": dict,
    "ema": dict | None,
    "position": int,
    "steps_per_epoch": int,
}


class Unfinished(NamedTuple):
    path: Path  # of the checkpoint
    state: dict[str, Any]

    def cohort(self, device: str | torch.device, peers: Sequence[str] | None) -> Cohort:
        """The peers as the end of training would save them: with `ema` their averages."""
        weights = {**self.state["cohort"], **(self.state["ema"] or {})}
        return Cohort.restore(self.state["description"], weights, self.path, device, peers=peers)

    def record(self) -> dict[str, Any]:
        """As of `Cohort`."""
        return {name: self.state["description"].get(name) for name in FIELDS}

    def describe(self) -> str:
        epoch, step = divmod(self.state["position"], self.state["steps_per_epoch"])
        return (
            f"the run has not ended: weights of {self.path}, from epoch {epoch + 1}, after {step} "
            f"of {self.state['steps_per_epoch']} steps"
        )


def unfinished(folder: Path) -> Unfinished | None:
    """The run in this folder as its checkpoint has it; None without a checkpoint, or with one of an
    early version that does not describe the peers."""
    found = read_newest(folder)
    if found is None:
        return None
    state, path = found.state, found.path
    if "description" not in state:
        return None
    for name, kind in ENTRIES.items():
        if not isinstance(state.get(name), kind):
            raise InputError(f"{path} is not a checkpoint that a run saved: no {name}")
    return Unfinished(path, state)
