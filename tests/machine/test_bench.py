"""`fastdml bench`: what it compares, and what it says of the outcome."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from fastdml import cli, host
from fastdml.machine import bench
from fastdml.machine.bench import Contest, Measured, verdict

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Shapes and peers that take no time."""
    monkeypatch.setitem(bench.LOSSES, "cpu", ((2, 4, 5), (3, 2, 7)))
    monkeypatch.setattr(bench, "PEERS", ("resnet8", "resnet8"))
    monkeypatch.setattr(bench, "BATCH", 4)
    monkeypatch.setattr(bench, "SIDE", 8)


def test_the_table_and_its_figures(small, capfd):
    assert cli.main(["bench", "--seconds", "1", "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    first, head, *_ = out.splitlines()
    assert "thread" in first
    assert f"torch {torch.__version__}" in first
    assert head.split()[:2] == ["what", "fastdml"]
    assert "loss and gradients, 3 peers, 2 x 7" in out
    assert "step, 2 resnet8, batch 4, fp32" in out
    assert "fastdml channels_last, the usual loop torch's default" in out


def test_samples_as_json(small, capfd):
    assert cli.main(["bench", "--seconds", "1", "--device", "cpu", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert {
        "device",
        "fastdml",
        "native loss",
        "torch",
        "triton",
        "Python",
        "busy",
    } <= report.keys()
    for row in report["rows"]:
        assert len(row["ours"]) == len(row["usual"]) >= 3
        assert min(row["ours"] + row["usual"]) > 0
        assert row["difference"] < 0.05


def test_what_differs_is_not_timed(small, monkeypatch, capfd):
    monkeypatch.setattr(bench.pairwise, "losses", lambda z, y: [x.sum() for x in z])
    assert cli.main(["bench", "--seconds", "1", "--device", "cpu"]) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("loss")]
    assert all("WRONG: results differ" in line for line in lines)
    never = Contest("c", lambda: 1 / 0, lambda: 1 / 0, math.nan, 1.0)
    assert bench._time(never, CPU, 1.0).ours == []


def test_steps_start_from_the_same_weights(small):
    """Several steps of both give the same losses, not the first alone."""
    contest = bench._step_contest(bench.resolve_amp("off", CPU), CPU)
    contest.usual()  # ours has taken two steps
    ours, usual = contest.ours().losses, torch.tensor(contest.usual())
    torch.testing.assert_close(ours.cpu(), usual, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "usual", "words"),
    [
        ([1.0, 1.1, 0.9], [3.0, 3.3, 2.7], "3.00x as fast"),
        ([2.0, 2.2, 1.8], [1.0, 1.1, 0.9], "slower: 0.50x as fast"),
        ([1.0, 3.0, 0.5], [1.2, 2.0, 0.8], "no clear difference (1.20x)"),
    ],
)
def test_verdicts_are_honest(ours, usual, words):
    assert verdict(Measured("x", ours, usual, 0.0)) == words


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (0.9, False), (1.0, True), (7.3, True)])
def test_other_programs_are_told(small, monkeypatch, capfd, load, said):
    monkeypatch.setattr(bench, "measure", lambda device, seconds: iter([]))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(host, "cpus", lambda: 2)
    assert cli.main(["bench", "--device", "cpu"]) == 0
    assert (f"(load {load} on 2 CPUs)" in capfd.readouterr().out) == said


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9"])
def test_seconds_that_make_no_sense(seconds, capfd):
    assert cli.main(["bench", f"--seconds={seconds}"]) == 2
    assert "--seconds must be within" in capfd.readouterr().err


@pytest.mark.gpu
def test_on_a_device(capfd):
    assert cli.main(["bench", "--seconds", "5", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert len(rows) == len(bench.LOSSES["cuda"]) + 2
