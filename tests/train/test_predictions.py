"""What a run keeps of each test image: against numpy on the logits, whatever the batches, and once
more where the run was resumed at its end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from report_runs import Page
from tiny_runs import CLASSES, CPU, make_cohort, make_images, make_loaders

from fastdml.cohort import Cohort
from fastdml.data import ResidentLoader
from fastdml.engine.amp import resolve_amp
from fastdml.eval_mode import evaluating
from fastdml.report.html.run_page import run_page
from fastdml.report.predictions import PREDICTIONS, Predictions, read_predictions
from fastdml.report.run_files import read_run
from fastdml.train import fit
from fastdml.train.predictions import Scorer, save_predictions
from fastdml.train.tasks.classification import SCORING, Classification

pytestmark = pytest.mark.usefixtures("_no_pictures")


def logits_of(cohort: Cohort, images) -> np.ndarray:
    """(K, N, C) float64, of a whole set at once."""
    loader = ResidentLoader(images, len(images), train=False)
    with evaluating(cohort), torch.no_grad():
        return np.stack([z.double().numpy() for z in cohort(loader.batch(0, 0)[0])])


def by_hand(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    with_mean = np.concatenate([p, p.mean(0, keepdims=True)])
    entropy = -(with_mean * np.log(with_mean)).sum(-1)
    return {
        "top": with_mean.argmax(-1),
        "confidence": with_mean.max(-1),
        "label_log": np.log(with_mean[:, np.arange(len(labels)), labels]),
        "disagreement": entropy[-1] - entropy[:-1].mean(0),
    }


def check(found: Predictions, cohort: Cohort, images) -> None:
    expected = by_hand(logits_of(cohort, images), images.labels.numpy())
    assert found.peers == tuple(cohort.names)
    assert found.label.tolist() == images.labels.tolist()
    assert found.top.tolist() == expected["top"].tolist()
    for name in ("confidence", "label_log", "disagreement"):
        assert getattr(found, name) == pytest.approx(expected[name], abs=2e-6), name
    order = np.argsort(-expected["disagreement"], kind="stable")
    assert found.pictured.tolist() == order[: len(found.pictured)].tolist()
    shown = images.images[torch.tensor(found.pictured)].permute(0, 2, 3, 1)
    assert found.true_colours
    assert found.pictures.tolist() == shown.tolist()


@pytest.mark.parametrize("batch_size", [7, 20, 50])
def test_rows_and_pictures_are_those_of_numpy(batch_size):
    cohort, images = make_cohort(), make_images(50, 2)
    scorer = Scorer(ResidentLoader(images, batch_size, train=False), resolve_amp("off", CPU))
    with evaluating(cohort):
        scores = scorer(cohort)
    found = scorer.predictions(cohort, "last")
    check(found, cohort, images)
    right = found.top == found.label
    assert [*scores.top1, scores.ensemble_top1] == pytest.approx(right.mean(1).tolist())
    assert [*scores.nll, scores.ensemble_nll] == pytest.approx(
        (-found.label_log).mean(1).tolist(), abs=1e-6
    )
    assert 0 <= found.disagreement.min() <= found.disagreement.max() <= math.log(2) + 1e-6


def test_a_run_keeps_both_phases_predictions(settings):
    cohort = make_cohort()
    result = fit(cohort, *make_loaders(), settings(independent=True, epochs=1))
    check(read_predictions(result.folder), cohort, make_images(50, 2))
    alone = result.independent.folder
    page = Page(run_page(read_run(result.folder), SCORING))
    hits = [f"{100 * v:.2f}" for v in [*result.scores.top1, result.scores.ensemble_top1]]
    assert [row[2].partition(" | ")[0] for row in page.table("Scores on 50")[1:]] == hits
    assert "own data: 6 batches of 16" in page.text
    assert {row[0] for row in page.table("Largest gain first")[1:]} == set("abcd")
    for folder in (result.folder, alone):
        found, scores = read_predictions(folder), result.scores
        if folder == alone:
            scores = result.independent.scores
        assert (found.top == found.label).mean(1)[:-1].tolist() == pytest.approx(scores.top1)


def test_a_finished_run_of_an_earlier_version_gets_them_by_resuming(settings):
    config = settings(epochs=1)
    folder = fit(make_cohort(), *make_loaders(), config).folder
    before = read_predictions(folder)
    (folder / PREDICTIONS).unlink()
    fit(make_cohort(seed=3), *make_loaders(), config.replace(resume=True))
    again = read_predictions(folder)
    assert again.top.tolist() == before.top.tolist()
    assert again.disagreement.tolist() == before.disagreement.tolist()
    written = (folder / PREDICTIONS).stat().st_mtime_ns
    fit(make_cohort(seed=3), *make_loaders(), config.replace(resume=True))
    assert (folder / PREDICTIONS).stat().st_mtime_ns == written


def test_own_batches_without_normalisation_are_stretched():
    random = np.random.default_rng(0)
    images = torch.tensor(random.normal(5, 3, (12, 1, 6, 6)), dtype=torch.float32)
    batches = [(images[:8], torch.arange(8) % CLASSES), (images[8:], torch.arange(4) % CLASSES)]
    scorer = Scorer(_Plain(batches), resolve_amp("off", CPU))
    cohort = make_cohort()
    with evaluating(cohort):
        scorer(cohort)
    found = scorer.predictions(cohort, "last")
    assert not found.true_colours
    assert found.classes == ()
    assert {(p.min(), p.max()) for p in found.pictures} == {(0, 255)}


class _Plain:
    """Batches that say nothing of themselves."""

    def __init__(self, batches):
        self.batches = batches

    def epoch(self, epoch):
        return iter(self.batches)


def test_large_pictures_become_small_and_other_inputs_have_none():
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for channels, size, pictures in ((3, (200, 300), (4, 64, 96, 3)), (5, (8, 8), (0, 1, 1, 1))):
        images = torch.rand(4, channels, *size)
        peers = [torch.nn.Sequential(model, torch.nn.Linear(channels, 2)) for _ in range(2)]
        cohort = Cohort(peers, 2)
        scorer = Scorer(_Plain([(images, torch.tensor([0, 1, 0, 1]))]), resolve_amp("off", CPU))
        with evaluating(cohort):
            scorer(cohort)
        assert scorer.predictions(cohort, "last").pictures.shape == pictures


def test_rows_without_probabilities_have_no_class():
    class Bad(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[math.nan, 1.0], [0.0, 1.0]])

    cohort = Cohort([Bad(), Bad()], 2)
    scorer = Scorer(
        _Plain([(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))]), resolve_amp("off", CPU)
    )
    with evaluating(cohort):
        scorer(cohort)
    found = scorer.predictions(cohort, "last")
    assert found.top.tolist() == [[-1, 1]] * 3
    assert found.pictured[0] == 1  # what is not a number is of no interest beside what is


def test_a_task_that_scores_in_its_own_way_keeps_nothing(tmp_path):
    class Own(Classification):
        def score(self, cohort, test, amp):
            return "own"

    scorer = Own().scorer(make_loaders()[1], resolve_amp("off", CPU))
    assert scorer(make_cohort()) == "own"
    save_predictions(tmp_path, make_cohort(), scorer)
    assert not list(tmp_path.iterdir())
