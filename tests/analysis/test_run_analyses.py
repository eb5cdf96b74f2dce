"""Every analysis of a run at once: what is kept, what is computed again, and what is of other
weights."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdml import analysis
from fastdml.analysis import analyse, current_analyses, peers_of_run, run_analyses
from fastdml.analysis.run_analyses import ANALYSES
from fastdml.cli.main import main
from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.report.predictions import read_predictions


@pytest.fixture(scope="module")
def analysed(finished_run, tmp_path_factory):
    """A copy of the run with all analyses, and what `analyse` gave."""
    folder = tmp_path_factory.mktemp("analysed") / "run"
    shutil.copytree(finished_run, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_analyses, "PLANE", 2)
        return folder, analyse(folder, images=20, device="cpu")


@pytest.fixture
def copy(analysed, tmp_path):
    return shutil.copytree(analysed[0], tmp_path / "run")


def test_all_analyses_of_both_phases(analysed):
    folder, found = analysed
    assert list(found) == ["mutual", "independent"]
    for phase, results in found.items():
        assert list(results) == list(ANALYSES)
        peers = peers_of_run(folder, phase, device="cpu")
        text = (peers.folder / "analysis.json").read_text()
        assert json.loads(text) == {"version": 1, **results}
        assert current_analyses(peers.folder) == results
        for result in results.values():
            for part in result if isinstance(result, list) else [result]:
                assert part["sha256"] == peers.sha256
                assert part["weights"] == "last"
                assert part["seed"] == 0
        expected = analysis.posterior(peers.cohort, peers.batches(20))
        assert results["posterior"]["entropy"] == expected.entropy.tolist()
        assert results["posterior"]["set"] == "training"
        (section,) = results["loss_section"]  # two peers: one pair
        assert section["peers"] == ["resnet8-1", "resnet8-2"]
        assert len(results["loss_plane"]["loss"]) == len(results["loss_plane"]["y"])
        assert results["flat_minima"]["images"] == 20
    mutual, alone = (results["flat_minima"]["loss"] for results in found.values())
    assert mutual != alone


def test_what_is_there_is_not_computed_again(copy, monkeypatch):
    calls = []

    def counted(name):
        make = ANALYSES[name]
        return lambda work: calls.append(name) or make(work)

    for name in ANALYSES:
        monkeypatch.setitem(run_analyses.ANALYSES, name, counted(name))
    analyse(copy, images=20, device="cpu")
    assert calls == []
    before = current_analyses(copy)
    analyse(copy, ["posterior"], images=10, device="cpu")  # other images
    assert calls == ["posterior"] * 2  # of both phases
    after = current_analyses(copy)
    assert after.pop("posterior") != before.pop("posterior")
    assert after == before


def test_an_interrupted_analysis_goes_on(finished_run, tmp_path, monkeypatch):
    folder = shutil.copytree(finished_run, tmp_path / "run")

    def interrupted(work):
        raise KeyboardInterrupt

    monkeypatch.setitem(run_analyses.ANALYSES, "flat_minima", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyse(folder, ["posterior", "flat_minima"], images=10, device="cpu")
    assert list(current_analyses(folder)) == ["posterior"]
    assert current_analyses(folder / "independent") == {}


def test_results_of_other_weights_are_not_current(copy):
    cohort = Cohort.load(copy)
    cohort[0].conv1.weight.data += 0.1
    assert current_analyses(copy)
    cohort.save(copy)
    assert current_analyses(copy) == {}
    assert current_analyses(copy / "independent")
    again = analyse(copy, ["posterior"], images=20, device="cpu")
    assert list(current_analyses(copy)) == ["posterior"]
    assert again["mutual"]["posterior"] == current_analyses(copy)["posterior"]


def test_which_labels_are_wrong_is_told_and_comes_onto_the_page(copy):
    """No run knows it. Weights other than those that predictions are of cannot be compared."""
    found, alone = (read_predictions(folder) for folder in (copy, copy / "independent"))
    noisy = np.arange(len(found.label)) % 5 == 0
    results = analyse(copy, [], noisy=noisy, device="cpu")
    expected = analysis.gains_by_noise(alone, found, noisy)
    told = current_analyses(copy)["gains_by_noise"]
    assert results == {"mutual": {"gains_by_noise": told}, "independent": {}}
    assert told["images"] == expected.images.tolist() == [(~noisy).sum(), noisy.sum()]
    assert told["gained"] == expected.gained.tolist()
    main(["report", str(copy)])
    page = (copy / "report.html").read_text()
    assert "Gains by label" in page
    assert "wrong label" in page
    with pytest.raises(InputError, match='weights="last" with noisy'):
        analyse(copy, [], noisy=noisy, weights="best", device="cpu")
    with pytest.raises(InputError, match="noisy must be 355 values"):
        analyse(copy, [], noisy=noisy[1:], device="cpu")
    shutil.rmtree(copy / "independent")
    with pytest.raises(InputError, match="independent=True"):
        analyse(copy, [], noisy=noisy, device="cpu")


def test_odd_files(copy):
    path = copy / "analysis.json"
    path.write_text('{"version": 1, "posterior": 3, "loss_section": [], "more": [{"weights": []}]}')
    assert current_analyses(copy) == {}
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        analyse(copy, ["posterior"], images=10, device="cpu")
    with pytest.raises(InputError, match="flat_minima"):
        analyse(copy, ["flatminima"])


def test_peers_of_several_architectures():
    """Sections only between those alike; without any, a random direction of each."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.arange(4))]
    for names, pairs in (
        (["resnet8", "resnet14", "resnet8"], [["resnet8-1", "resnet8-2"]]),
        (["resnet8", "resnet14"], [["resnet8"], ["resnet14"]]),
    ):
        peers = SimpleNamespace(cohort=Cohort(names, 4), batches=lambda *_: data)
        work = run_analyses._Work(peers, images=4, seed=0)
        assert [found["peers"] for found in ANALYSES["loss_section"](work)] == pairs
        assert work.alike == ([(0, 2)] if len(names) == 3 else [])
