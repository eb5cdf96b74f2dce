"""A table whose trainings run on a GPU: seeds together, in the execution that is fastest there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastdml.reproduce import SCALES, results, run_all
from fastdml.reproduce.scales import BRIEF

NAME = "table2:resnet32+resnet32"
TRAINING = "trainings/digits/digits-resnet8-x2/seeds-0-1"


@pytest.mark.gpu
def test_seeds_are_trained_together_and_not_again(tmp_path, monkeypatch, capfd):
    short = {"epochs": 2, "batch_size": 64, **BRIEF}
    monkeypatch.setattr(results, "draw", lambda folder, record: [])  # slow
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(SCALES["digits"], settings=short))
    options = {"scale": "digits", "seeds": 2, "device": "cuda", "folder": tmp_path}
    (found,) = run_all([NAME], **options)
    said = capfd.readouterr().err
    assert "execution: " in said
    assert found.failures == ()
    assert found.record.provenance["device"].startswith(torch.cuda.get_device_name())
    assert any("trained together" in note for note in found.record.notes)
    for row in found.record.rows:
        assert None not in (*row.ours.values, *row.baseline.values)
    summary = tmp_path / TRAINING / "summary.json"
    written = summary.stat().st_mtime_ns
    (again,) = run_all([NAME], **options)
    assert again.record.rows == found.record.rows
    assert summary.stat().st_mtime_ns == written
