"""Analyses of the peers of a run, found by its folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fastdml import Cohort
from fastdml.analysis import (
    flat_minima,
    flat_minima_of_run,
    peers_of_run,
    posterior,
    posterior_of_run,
)
from fastdml.analysis.run import images_of_run
from fastdml.data import load
from fastdml.errors import InputError
from fastdml.train.config.sources import preset


def test_images_of_a_run(finished_run):
    """Those it was trained on, without augmentation: the settings' subset of the set."""
    train, test = load("digits")
    found = peers_of_run(finished_run, device="cpu")
    ((x, y),) = found.batches(0)
    expected = train.subset(200, 0)
    assert torch.equal(y, expected.labels)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (expected.mean, expected.std))
    torch.testing.assert_close(x, (expected.pixels.permute(0, 3, 1, 2).float() - mean) / std)
    fewer = torch.cat([labels for _, labels in found.batches(50)])
    assert fewer.bincount().tolist() == [5] * 10
    assert sum(len(labels) for _, labels in found.batches(0, "test")) == len(test)


def test_measurements_of_a_run_are_those_of_its_peers(finished_run):
    for phase, folder in (("mutual", ""), ("independent", "independent")):
        cohort = Cohort.load(finished_run / folder)
        data = peers_of_run(finished_run, phase, device="cpu").batches(60)
        found = flat_minima_of_run(
            finished_run, phase, images=60, scales=[0.1], draws=1, seed=2, device="cpu"
        )
        expected = flat_minima(cohort, data, scales=[0.1], draws=1, seed=2)
        np.testing.assert_array_equal(found.loss, expected.loss)
        sure = posterior_of_run(finished_run, phase, images=60, device="cpu")
        np.testing.assert_array_equal(sure.ranked, posterior(cohort, data).ranked)
    assert sure.peers == ("resnet8-1", "resnet8-2", "ensemble")


def test_weights_of_a_run(finished_run):
    last, best = (
        peers_of_run(finished_run, weights=which, device="cpu") for which in ("last", "best")
    )
    alone = peers_of_run(finished_run, "independent", device="cpu")
    assert last.weights == alone.weights == "last"
    assert last.sha256 == best.sha256 != alone.sha256  # of one epoch
    assert alone.folder == finished_run / "independent"


def test_data_that_have_moved(finished_run, tmp_path):
    found = peers_of_run(finished_run, root=tmp_path, device="cpu")
    assert found.config.root == str(tmp_path)
    assert posterior_of_run(finished_run, images=10, root=tmp_path, device="cpu").images == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [({"phase": "both"}, "phase"), ({"weights": "first"}, "weights")],
)
def test_what_a_run_does_not_have(finished_run, options, words):
    with pytest.raises(InputError, match=words):
        peers_of_run(finished_run, **options)


def test_runs_that_cannot_be_analysed(finished_run, tmp_path):
    with pytest.raises(InputError, match="not the folder of a run"):
        posterior_of_run(tmp_path)
    unfinished = tmp_path / "run"
    shutil.copytree(finished_run, unfinished)
    (unfinished / "cohort.json").unlink()
    with pytest.raises(InputError, match="when the run ends"):
        posterior_of_run(unfinished)
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    path = other / "cohort.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "classes": [f"c{i}" for i in range(10)]}))
    with pytest.raises(InputError, match="other classes"):
        posterior_of_run(other)
    own = tmp_path / "own"
    shutil.copytree(finished_run, own)
    text = (own / "config.yaml").read_text()
    (own / "config.yaml").write_text(text.replace("data: digits", "data: mine"))
    with pytest.raises(InputError, match="peers and batches to the functions"):
        posterior_of_run(own)


def test_missing_images_are_told_with_a_call_that_there_is(finished_run, tmp_path):
    """The functions here have no option for a download."""
    moved = preset("cifar100", root=str(tmp_path / "none"))
    cohort = Cohort.load(finished_run)
    with pytest.raises(InputError) as refused:
        images_of_run(moved, cohort, torch.device("cpu"))
    assert str(refused.value) == (
        f"{tmp_path / 'none'}: no such folder: name the one that holds CIFAR-100, or use "
        "fastdml.data.load(..., download=True)"
    )
