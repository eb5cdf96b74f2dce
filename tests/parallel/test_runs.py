"""Whole runs on a mesh are those of one process: 30 steps, their metrics and weights at the end.

A column of the mesh is a part of the batch: `data=D` is `accumulate=D` of one process. The mesh
"peer=1" is one process that seeds what peers draw as the ranks of a mesh do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from whole_runs import Run, assert_same, of_people, on_cifar, on_digits, trained

from fastdml.report.metrics_log import read_metrics
from fastdml.report.summary import read_summary
from fastdml.train import load_config

pytestmark = pytest.mark.usefixtures("_own_scans")


class Case(NamedTuple):
    mesh: str
    both: dict[str, Any]  # settings of the run on the mesh and of that of one process
    alone: dict[str, Any]  # settings of the latter
    same: dict[str, Any]  # how near: of `assert_same`
    run: Any = trained


FEW = {"drop": 0.2, "ema": 0.9, "accumulate": 2, "teacher": True, "K": 3}
OWN = {"statistics": False}  # of each column
TWO = {
    "peers": Case("peer=2", {}, {}, {}),
    "peers that draw": Case("peer=2", FEW, {"mesh": "peer=1"}, {}),
    "columns": Case("data=2", {"ema": 0.9, "unlabelled": True}, {"accumulate": 2}, OWN),
    "one BatchNorm": Case("data=2", {}, {}, {"metrics": 1e-9, "weights": 1e-11}),
}
FOUR = {
    "rows and columns": Case(
        "peer=2,data=2",
        {"K": 3, "drop": 0.2, "independent": True},
        {"mesh": "peer=1", "accumulate": 2},
        OWN,
    ),
    "unequal numbers of peers": Case("peer=4", {"K": 5}, {}, {}),
}
LONG = {
    "bf16": Case(
        "peer=2,data=2",
        {"dtype": torch.float32, "amp": "bf16"},
        {"accumulate": 2},
        {"metrics": 1e-5, **OWN},
    ),
    "four columns": Case(
        "data=4", {"unlabelled": True}, {"accumulate": 4}, {"weights": 1e-11, **OWN}
    ),
    "digits": Case(
        "peer=2,data=2", {}, {"accumulate": 2}, {"metrics": 1e-4, "weights": 1e-4, **OWN}, on_digits
    ),
    "people, peers": Case("peer=2", {}, {}, {"metrics": 1e-4, "weights": 1e-4}, of_people),
    # Losses on features pick the hardest pairs, so that rounding soon picks others: small steps.
    "people": Case(
        "peer=2,data=2",
        {"sync_batchnorm": True, "lr": 1e-4},
        {},
        {"metrics": 2e-3, "weights": 2e-3},
        of_people,
    ),
}


def on_ranks(folder: str, cases: dict[str, Case]) -> dict[str, Run]:
    return {
        name: case.run(case.mesh, Path(folder, name), **case.both, **_of_mesh(name))
        for name, case in cases.items()
    }


def _of_mesh(name: str) -> dict[str, Any]:
    return {"sync_batchnorm": True} if name == "one BatchNorm" else {}


def compared(world: int, folder: Path, cases: dict[str, Case]) -> tuple[list, dict[str, Run]]:
    alone = {}
    for name, case in cases.items():
        changes = {**case.both, **case.alone}
        alone[name] = case.run(changes.pop("mesh", ""), folder / name, **changes)
    return run_ranks(world, on_ranks, str(folder / "ranks"), cases, timeout=300), alone


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return compared(2, tmp_path_factory.mktemp("two"), TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return compared(4, tmp_path_factory.mktemp("four"), FOUR)


def check(name: str, case: Case, ranks: list[dict[str, Run]], alone: dict[str, Run]) -> None:
    ours, theirs = ranks[0][name], alone[name]
    assert len(ours.records) > 10
    assert_same(ours, theirs, **case.same)
    for other in ranks:
        assert other[name].result.scores == ours.result.scores
        if ours.given_back is None:
            continue
        for key, value in other[name].given_back.items():  # every rank has all peers again
            assert torch.equal(value, ours.weights[key]), key


@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(two, name):
    check(name, TWO[name], *two)


@pytest.mark.parametrize("name", FOUR)
def test_on_four_ranks(four, name):
    check(name, FOUR[name], *four)


def test_the_independent_run_too(four):
    ranks, alone = four
    ours, theirs = ranks[0]["rows and columns"].result, alone["rows and columns"].result
    losses = [
        [r["loss"] for r in read_metrics(result.independent.folder) if r["kind"] == "epoch"]
        for result in (ours, theirs)
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-9, atol=1e-9)
    assert losses[0] != [r["loss"] for r in read_metrics(ours.folder) if r["kind"] == "epoch"]


def test_the_summary_has_the_mesh_and_what_it_sent(four):
    result = four[0][0]["unequal numbers of peers"].result
    mesh = {"peer": 4, "data": 1, "ranks": 4, "rows": [0, 0, 1, 2, 3]}
    sent = 5 * 8 * 4 * 8  # logits (8, 4) of 5 peers, of 8 bytes
    assert read_summary(result.folder)["mutual"]["mesh"] == {**mesh, "bytes_a_step": sent}
    assert load_config(result.folder / "config.yaml").mesh == "peer=4,data=1"
    assert result.images_per_second > 0
    alone = four[1]["unequal numbers of peers"].result
    assert "mesh" not in read_summary(alone.folder)["mutual"]


@pytest.mark.slow
def test_long_cases(tmp_path, market_root):
    for name in [n for n in LONG if n.startswith("people")]:
        LONG[name].both["root"] = market_root
    four = {name: case for name, case in LONG.items() if case.mesh != "peer=2"}
    two = {name: case for name, case in LONG.items() if case.mesh == "peer=2"}
    for world, cases in ((4, four), (2, two)):
        found = compared(world, tmp_path / str(world), cases)
        for name, case in cases.items():
            check(name, case, *found)


@pytest.mark.slow
def test_real_images_of_cifar100(tmp_path, cifar100_root):
    near = {"metrics": 1e-4, "weights": 1e-4, **OWN}
    case = Case("peer=2,data=2", {"root": str(cifar100_root)}, {"accumulate": 2}, near, on_cifar)
    check("cifar", case, *compared(4, tmp_path, {"cifar": case}))
