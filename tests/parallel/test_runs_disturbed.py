"""Signals to one rank at any point of a run on a mesh, and other settings when it goes on: all
ranks end alike, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from whole_runs import assert_same, trained

from fastdml.errors import InputError
from fastdml.train import TrainingStopped
from fastdml.train.saving import FolderCheckpoints
from fastdml.train.sharding import SeenBatches
from fastdml.train.trainer import Trainer

pytestmark = pytest.mark.slow


class At:
    """Inside, the n-th call of a method sends rank 1 SIGTERM before it begins."""

    def __init__(self, owner: type, name: str, n: int) -> None:
        self.owner, self.name, self.was, calls = owner, name, getattr(owner, name), [0]

        def method(this: Any, *args: Any) -> Any:
            calls[0] += 1
            if calls[0] == n and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return self.was(this, *args)

        self.method = method

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.method)

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.was)


INDEPENDENT = {"independent": True}
STOPPED: dict[str, tuple[type, str, int, dict[str, Any], str]] = {
    "before": (Trainer, "run", 1, {}, "in epoch 1, after 3 of 6 steps"),
    "evaluation": (Trainer, "_evaluate", 2, {}, "in epoch 3, after 0 of 6 steps"),
    "save": (FolderCheckpoints, "save", 3, {}, "in epoch 3, after 0 of 6 steps"),
    "writing": (FolderCheckpoints, "_write", 3, {}, "after "),
    "independent": (Trainer, "_evaluate", 7, INDEPENDENT, "in epoch 3, after 0 of 6 steps"),
}
ENDED = {"step": (SeenBatches, "add", 30), "evaluation": (Trainer, "_evaluate", 5)}
OTHER = {
    "peers": ({"K": 3}, "cannot resume: peers was "),
    "seed": ({"seed": 4}, "cannot resume: seed was 0 and is now 4"),
    "batch_size": ({"batch_size": 6}, "cannot resume: data was "),
    "lr": ({"lr": 0.3}, "cannot resume: lr was 0.05 and is now 0.3"),
}


def disturbed(folder: str) -> dict[str, Any]:
    top, found = Path(folder), {}
    found["whole"] = trained("peer=2", top / "whole")
    found["whole, independent"] = trained("peer=2", top / "both", **INDEPENDENT)
    for place, (owner, name, n, changes, _) in STOPPED.items():
        try:
            with At(owner, name, n):
                found[place] = trained("peer=2", top / place, **changes)
        except TrainingStopped as stop:
            found[place] = stop.code, str(stop)
        found[f"{place}, resumed"] = trained("peer=2", top / place, resume=True, **changes)
    for place, at in ENDED.items():
        with At(*at):
            found[f"last {place}"] = trained("peer=2", top / f"last {place}")
    for name, (changes, _) in OTHER.items():
        try:
            trained("peer=2", top / "whole", resume=True, **changes)
            found[f"other {name}"] = "nothing"
        except InputError as error:
            found[f"other {name}"] = str(error)
    trained("peer=2", top / "longer", epochs=3)
    found["longer"] = trained("peer=2", top / "longer", resume=True)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_ranks(2, disturbed, str(tmp_path_factory.mktemp("disturbed")), timeout=300)


@pytest.mark.parametrize("place", STOPPED)
def test_a_signal_at_any_point_loses_nothing(runs, place):
    first, second = runs
    assert first[place] == second[place]
    code, text = first[place]
    assert code == 128 + signal.SIGTERM
    assert STOPPED[place][-1] in text
    whole = "whole, independent" if place == "independent" else "whole"
    assert_same(first[f"{place}, resumed"], first[whole])


@pytest.mark.parametrize("place", ENDED)
def test_a_signal_at_the_end_lets_the_run_end(runs, place):
    for found in runs:
        assert_same(found[f"last {place}"], found["whole"])


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused_alike(runs, name):
    first, second = (found[f"other {name}"] for found in runs)
    assert first == second
    assert first.startswith(OTHER[name][1])


def test_more_epochs_than_at_first(runs):
    assert_same(runs[0]["longer"], runs[0]["whole"])
