"""The summary of a run, and tables of scores."""

from __future__ import annotations

import json
import math

import pytest

from fastdml.errors import InputError
from fastdml.report.summary import SUMMARY, read_summary, write_summary
from fastdml.report.tables import summary_table
from fastdml.train.tasks.classification import SCORING, table

NAMES = ["resnet20-1", "resnet20-2"]


def scores(top1: list[float], ensemble: float) -> dict:
    return {
        "rows": 10_000,
        "top1": top1,
        "top5": [0.9] * len(top1),
        "ece": [0.031] * len(top1),
        "nll": [1.25] * len(top1),
        "entropy": [0.5] * len(top1),
        "nonfinite": [0] * len(top1),
        "ensemble_top1": ensemble,
        "ensemble_top5": 0.95,
        "ensemble_ece": 0.02,
        "ensemble_nll": 1.0,
        "ensemble_entropy": math.nan,
    }


def summarise(folder, *, independent: bool) -> dict:
    def run(top1, ensemble, rate):
        return {"scores": scores(top1, ensemble), "images_per_second": rate, "wall_seconds": 60.5}

    return write_summary(
        folder,
        config={"data": "cifar100", "epochs": 200},
        scoring=SCORING,
        peers=NAMES,
        parameters=[278_324, 278_324],
        device="one device",
        execution="threads",
        threads=2,
        command="fastdml train cifar100 --epochs 200",
        mutual=run([0.7119, 0.7075], 0.7312, 4321.4),
        independent=run([0.6899, 0.6912], 0.7201, 4400.0) if independent else None,
    )


def test_summary_holds_what_was_run_and_what_came_out(tmp_path):
    summary = summarise(tmp_path, independent=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["config"] == {"data": "cifar100", "epochs": 200}
    assert set(summary["versions"]) == {"python", "fastdml", "torch", "triton", "numpy"}
    assert summary["device"] == "one device"
    assert summary["peers"][1] == {
        "name": "resnet20-2",
        "parameters": 278_324,
        "accuracy_mutual": 0.7075,
        "accuracy_independent": 0.6912,
    }
    assert summary["ensemble_mutual"] == 0.7312
    assert summary["ensemble_independent"] == 0.7201
    assert summary["mutual"]["wall_seconds"] == 60.5
    assert summary["mutual"]["scores"]["ensemble_entropy"] is None


@pytest.mark.parametrize(
    ("text", "why"), [("{", "is not JSON"), ("[]", "is not a JSON object"), (None, "is no summary")]
)
def test_what_is_no_summary_is_said_to_be_none(tmp_path, text, why):
    if text is None:
        (tmp_path / SUMMARY).mkdir()
    else:
        (tmp_path / SUMMARY).write_text(text)
    with pytest.raises(InputError, match=why):
        read_summary(tmp_path)


def test_table_compares_independent_and_mutual(tmp_path):
    table = summary_table(summarise(tmp_path, independent=True), SCORING)
    assert table.splitlines() == [
        "peer        parameters  independent %  mutual %  ensemble %  images/s",
        "---------------------------------------------------------------------",
        "resnet20-1     278,324          68.99     71.19       73.12     4,321",
        "resnet20-2     278,324          69.12     70.75       73.12     4,321",
        "ensemble: mean of the mutual peers' probabilities (independent peers': 72.01 %); "
        "images/s: all peers together (independent: 4,400)",
    ]


def test_table_without_the_comparison(tmp_path):
    summary = summarise(tmp_path, independent=False)
    assert summary["ensemble_independent"] is None
    head, _, row, *_ = summary_table(summary, SCORING).splitlines()
    assert head == "peer        parameters  mutual %  ensemble %  images/s"
    assert row.split() == ["resnet20-1", "278,324", "71.19", "73.12", "4,321"]


def test_a_run_too_short_for_a_rate_has_a_dash(tmp_path):
    summary = summarise(tmp_path, independent=True)
    for run in ("mutual", "independent"):
        summary[run]["images_per_second"] = 0.0
    lines = summary_table(summary, SCORING).splitlines()
    assert lines[2].split()[-1] == "-"
    assert lines[-1].endswith("all peers together (independent: -)")


def test_a_run_without_an_evaluation_has_a_table_too(tmp_path):
    run = {"scores": None, "images_per_second": 10.0, "wall_seconds": 1.0}
    summary = write_summary(
        tmp_path, config={}, scoring=SCORING, peers=["a"], parameters=[5], device="cpu", mutual=run,
        execution="eager", threads=None, command="fastdml.train.fit",
    )  # fmt: skip
    row = summary_table(summary, SCORING).splitlines()[2].split()
    assert row == ["a", "5", "-", "-", "10"]


def test_scores_table_has_a_row_a_peer_and_one_for_the_ensemble():
    lines = table(NAMES, scores([0.7, 0.5], 0.75)).splitlines()
    assert lines[0].split("  ")[0] == "peer"
    assert lines[2].split() == ["resnet20-1", "70.00", "90.00", "3.10", "1.2500", "0.5000"]
    assert lines[4].split() == ["ensemble", "75.00", "95.00", "2.00", "1.0000", "nan"]
    assert lines[5] == "10,000 test images"
    broken = scores([0.7, 0.5], 0.75) | {"nonfinite": [0, 3]}
    assert table(NAMES, broken).endswith("outputs that are not finite: resnet20-2: 3")
