"""Runs on a mesh evaluate, choose and keep what a run of one process does, and `fastdml evaluate`
reads what they leave."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from ranks import run_ranks
from reid_runs import SMALL
from test_evaluation import images, peers

from fastdml import Cohort, train
from fastdml.cli.main import main
from fastdml.data import ResidentLoader
from fastdml.parallel import make_mesh
from fastdml.report.predictions import PREDICTIONS
from fastdml.train import TrainConfig

RUN = {
    "batch_size": 8, "epochs": 2, "eval_every": 1, "log_every": 0, "amp": "off", "threads": 1,
    "execution": "eager", "tensorboard": False, "lr": 0.05, "ema": 0.5, "independent": True,
    "figures": (),
}  # fmt: skip


def own_run(shape, accumulate, folder):
    """A run of own peers and images, chosen by validation images; its result on every rank. The
    parts of a batch leave other running statistics in columns than in turn, so there are none."""
    torch.set_num_threads(1)
    mesh, cohort = make_mesh(*shape, timeout=60), peers(running=False)
    share = {"rank": mesh.column, "world": mesh.data}
    loader = ResidentLoader(images(40), 8, train=True, pad=1, **share)
    tested, validated = (ResidentLoader(images(n), 4, train=False) for n in (26, 11))
    config = TrainConfig(folder=str(folder), accumulate=accumulate, **RUN)
    result = train.fit(cohort, loader, tested, config, validation=validated, mesh=mesh)
    return {
        "scores": result.scores,
        "best": (result.best_epoch, result.best_scores, result.best_validation_scores),
        "independent": result.independent.scores,
        "weights": {key: value.numpy() for key, value in cohort.state_dict().items()},
    }


def reid_run(mesh, folder, root):
    torch.set_num_threads(1)
    settings = {**SMALL, "folder": str(folder), "mesh": mesh, "triplet_weight": 1.0, "figures": ()}
    return train.market1501(root=str(root), **settings).history


def records(folder):
    """What the log says of evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = ("validation", "test")
    return [
        {k: v for k, v in line.items() if k != "time"} for line in lines if line["kind"] in kinds
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("tqdm", reason="runs need the extra train")
    folder = tmp_path_factory.mktemp("runs")
    one = run_ranks(1, own_run, (1, 1), 2, folder / "one", timeout=120)
    four = run_ranks(4, own_run, (2, 2), 1, folder / "four", timeout=120)
    return one, four, folder


def test_scores_and_choices_are_those_of_one_process_on_every_rank(runs):
    one, four, _ = runs
    for said in four:
        for name in ("scores", "best", "independent"):
            assert said[name] == one[0][name]
        for key, value in one[0]["weights"].items():
            assert (said["weights"][key] == value).all(), key


@pytest.mark.parametrize("phase", ["", "independent"])
def test_the_lead_logs_them_and_keeps_the_predictions(runs, phase):
    one, four = (runs[2] / name / phase for name in ("one", "four"))
    assert records(four) == records(one) != []
    assert (four / PREDICTIONS).read_bytes() == (one / PREDICTIONS).read_bytes()


def test_the_best_weights_are_those_of_one_process(runs):
    one, four = (
        Cohort.load(runs[2] / name / "best", peers=list(peers(running=False)))
        for name in ("one", "four")
    )
    for key, value in one.state_dict().items():
        assert torch.equal(four.state_dict()[key], value), key


@pytest.mark.slow
def test_a_reid_run_on_a_peer_axis_scores_as_one_process(market_root, tmp_path):
    """And the command scores what it leaves, as it does that of one process."""
    folders = {"peer=1,data=1": tmp_path / "one", "peer=2,data=1": tmp_path / "two"}
    for mesh, folder in folders.items():
        histories = run_ranks(2 if "peer=2" in mesh else 1, reid_run, mesh, folder, market_root)
        assert all(history[-1]["epoch"] == 2 for history in histories)
    one, two = folders.values()
    assert records(two) == records(one) != []
    said = []
    for folder in folders.values():
        with redirect_stdout(StringIO()) as out:
            main(["evaluate", str(folder), "--json"])
        said.append(json.loads(out.getvalue()))
    assert said[0]["scores"] == said[1]["scores"]
