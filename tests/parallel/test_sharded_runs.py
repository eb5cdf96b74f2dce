"""Whole runs of sharded peers: the same as those of whole ones, and resumed on other meshes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from sharded_nets import C, Net

from fastdml import Cohort
from fastdml.parallel import make_mesh
from fastdml.train import TrainConfig, fit

ROWS, BATCH = 48, 16
NAMES = [f"peers.{k}" for k in range(2)]


def cohort() -> Cohort:
    torch.manual_seed(4)
    return Cohort([Net(5, True), Net(7, True)], C)


def arrays(seed: int, rows: int = ROWS) -> tuple:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (rows,), generator=g)
    images = torch.randn(rows, 3, 6, 6, generator=g)
    images[torch.arange(rows), labels % 3, labels % 6] += 2.0
    return images, labels


def config(folder: Path, **changes) -> TrainConfig:
    settings = {
        "batch_size": BATCH, "epochs": 2, "lr": 0.05, "amp": "off", "ema": 0.9, "seed": 3,
        "folder": str(folder), "tensorboard": False, "threads": 1, "execution": "eager",
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def trained(folder: Path, sizes=None, **changes) -> dict:
    torch.set_num_threads(1)
    made = cohort()
    mesh = None if sizes is None else make_mesh(*sizes)
    result = fit(
        made, arrays(1), arrays(2, 37), config(folder, **changes), mesh=mesh,
        validation=arrays(3, 21),
    )  # fmt: skip
    return {
        "scores": json.dumps([str(result.scores), str(result.best_scores)]),
        "history": [record["loss"] for record in result.history],
        "weights": saved(folder),
        "best": saved(folder / "best"),
        "parameters": result.parameters,
    }


def saved(folder: Path) -> dict:
    peers = [Net(5, True), Net(7, True)]
    return Cohort.load(folder, peers=peers).state_dict()


def close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=2e-5, atol=2e-6, msg=name)


def on_two(tmp: Path) -> dict:
    return {
        "sharded": trained(tmp / "sharded", (1, 2), fsdp=True),
        "whole": trained(tmp / "whole", (1, 2)),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("runs")
    return tmp, run_ranks(2, on_two, tmp, timeout=100)


def test_a_run_of_sharded_peers_is_that_of_whole_ones(runs):
    _, ranks = runs
    for found in ranks:
        ours, theirs = found["sharded"], found["whole"]
        for what in ("weights", "best"):
            close(ours[what], theirs[what])
        torch.testing.assert_close(ours["history"], theirs["history"], rtol=1e-5, atol=1e-5)
        assert ours["parameters"] == theirs["parameters"]
