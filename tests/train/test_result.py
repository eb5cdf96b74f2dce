"""A result to look at: a table in a terminal and in a notebook, a frame of the epochs."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdml.errors import MissingExtra
from fastdml.metrics import ClassificationScores
from fastdml.train import RetrievalScores, TrainConfig, TrainResult


def scores(kind: type, *values: float):
    """Each score of peer k is values[k], the ensemble's the last value."""
    made = {}
    for field in fields(kind):
        made[field.name] = values[-1] if field.name.startswith("ensemble") else list(values[:-1])
    made["rows" if kind is ClassificationScores else "queries"] = 9
    return kind(**made)


def result(found=None, **changes) -> TrainResult:
    record = {"step": 6, "ce": [1.25, 2.5], "kl": [0.5, 0.75], "lr": 0.1,
              "pairwise_kl": [[0.0, 1.0], [2.0, 0.0]]}  # fmt: skip
    history = [{"epoch": 1, **record}, {"epoch": 2, **record, "step": 12}]
    if found is not None:
        history[-1]["test"] = {"top1": [0.5, 0.25], "ensemble_top1": 0.75}
    values = {
        "folder": Path("runs/<b>-001"), "config": TrainConfig(), "peers": ("net-1", "<i>"),
        "parameters": (1234567, 89), "history": history, "scores": found,
        "best_epoch": 2 if found else 0, "best_scores": found, "weights": {},
        "images_per_second": 1234.5, "data_wait": 0.1, "seconds": 61.2, "skipped_steps": 0,
        "device": "CPU", "precision": "fp32", "execution": "eager", "threads": 1,
    }  # fmt: skip
    return TrainResult(**{**values, **changes})


def test_print_shows_a_table():
    text = str(result(scores(ClassificationScores, 0.5, 0.25, 0.6)))
    lines = text.splitlines()
    assert [line.split() for line in lines[:1] + lines[2:5]] == [
        ["peer", "parameters", "top-1", "%"],
        ["net-1", "1,234,567", "50.00"],
        ["<i>", "89", "25.00"],
        ["ensemble", "60.00"],
    ]
    assert lines[5] == (
        "2 epochs, best epoch 2, 61 s, 1,234 images/s, fp32 on CPU; run folder: runs/<b>-001"
    )
    assert len(lines) == 6


def test_one_epoch_is_no_epochs():
    history = [{**result().history[0]}]
    assert "\n1 epoch, 61 s" in str(result(history=history))


def test_both_runs_stand_beside_each_other():
    alone = result(scores(ClassificationScores, 0.1, 0.2, 0.3))
    both = result(scores(ClassificationScores, 0.4, 0.5, 0.6), independent=alone)
    header, _, first, second, ensemble, _ = str(both).splitlines()
    assert re.search("top-1 % independent +top-1 % mutual$", header)
    assert first.split()[-2:] == ["10.00", "40.00"]
    assert second.split()[-2:] == ["20.00", "50.00"]
    assert ensemble.split() == ["ensemble", "30.00", "60.00"]


def test_of_retrieval_and_of_no_evaluation():
    text = str(result(scores(RetrievalScores, 0.5, 0.25, 0.6)))
    assert re.search(r"mAP % +rank-1 %\n", text)
    assert re.search(r"net-1 +1,234,567 +50\.00 +50\.00\n", text)
    text = str(result())
    assert re.search(r"parameters +cross-entropy +KL\n", text)
    assert re.search(r"net-1 +1,234,567 +1\.2500 +0\.5000\n", text)
    assert "ensemble" not in text
    one = result(
        peers=("net",), parameters=(5,), history=[{"epoch": 1.5, "ce": [1.0], "kl": [0.0]}]
    )
    assert "1.5 epochs, 61 s" in str(one)


def test_a_single_peer_is_no_ensemble():
    found = scores(ClassificationScores, 0.5, 0.5)
    assert "ensemble" not in str(result(found, peers=("net",), parameters=(5,)))


def test_representations_are_short_and_safe():
    found = result(scores(ClassificationScores, 0.5, 0.25, 0.6))
    assert repr(found) == "<TrainResult of 2 peers in runs/<b>-001: print shows a table>"
    page = found._repr_html_()
    assert "<td>&lt;i&gt;</td><td>89</td><td>25.00</td>" in page
    assert "runs/&lt;b&gt;-001" in page
    assert page.count("<tr>") == page.count("</tr>") == 4


def test_a_notebook_shows_the_curves_where_they_are_drawn(tmp_path):
    found = replace(result(scores(ClassificationScores, 0.5, 0.25, 0.6)), folder=tmp_path)
    assert "<img" not in found._repr_html_()
    (tmp_path / "curves.png").write_bytes(b"picture")
    page = found._repr_html_()
    (picture,) = re.findall(r'<img [^>]*alt="([^"]*)" src="data:image/png;base64,([^"]*)">', page)
    assert picture == ("Losses and scores by epoch of net-1, &lt;i&gt;", "cGljdHVyZQ==")


def frame(found: TrainResult, monkeypatch) -> list[dict]:
    """The rows that pandas is given, which need not be installed here."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    return found.to_frame()


def test_a_frame_has_a_row_an_epoch_and_peer(monkeypatch):
    found = result(scores(ClassificationScores, 0.5, 0.25, 0.6))
    rows = frame(replace(found, independent=found), monkeypatch)
    assert [(r["run"], r["epoch"], r["peer"]) for r in rows] == [
        (run, epoch, peer)
        for run in ("mutual", "independent")
        for epoch in (1, 2)
        for peer in ("net-1", "<i>")
    ]
    assert rows[3] == {
        "run": "mutual", "peer": "<i>", "epoch": 2, "step": 12, "ce": 2.5, "kl": 0.75, "lr": 0.1,
        "test_top1": 0.25, "test_ensemble_top1": 0.75,
    }  # fmt: skip
    assert "test_top1" not in rows[0]


def test_a_frame_by_pandas_itself():
    pytest.importorskip("pandas")
    frame = result(scores(ClassificationScores, 0.5, 0.25, 0.6)).to_frame()
    assert frame.shape == (4, 9)
    assert frame[frame.peer == "<i>"].ce.tolist() == [2.5, 2.5]
    assert frame.test_top1.isna().tolist() == [True, True, False, False]


def test_without_pandas_the_message_is_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"^pandas is not installed: pip install pandas$"):
        result().to_frame()
