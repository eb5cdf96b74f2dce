"""Semi-supervised runs: a set that keeps few of its labels, and images without any beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import crashing, logged, same_weights
from torch import nn

from fastdml import train as training
from fastdml.cohort import Cohort
from fastdml.data import ImageSet, MixedSampler, ResidentLoader, load_digits
from fastdml.data.image_files import Splits
from fastdml.data.image_set import IGNORED
from fastdml.data.loaders import make
from fastdml.data.semi_supervised import split_labelled
from fastdml.data.validation import split_validation
from fastdml.errors import InputError
from fastdml.report.html import run_page
from fastdml.report.run_files import read_run
from fastdml.train import ReidConfig, fit
from fastdml.train.config.sources import preset
from fastdml.train.tasks.classification import SCORING, divided

pytestmark = pytest.mark.usefixtures("_no_pictures")
DIGITS = {
    "epochs": 2, "batch_size": 16, "subset": 120, "execution": "eager", "threads": 1, "amp": "off",
    "device": "cpu", "tensorboard": False, "eval_every": 2,
}  # fmt: skip
needs_dali = pytest.mark.skipif(not make.has_dali(), reason="DALI is not installed")


def digits(folder, **changes):
    """A run on digits and its peers' last weights."""
    result = training.digits(**{**DIGITS, "folder": str(folder), **changes})
    return result, Cohort.load(result.folder)


def test_without_a_share_it_is_the_supervised_run_on_the_labelled_images(tmp_path):
    options = {"subset": 0, "epochs": 1}
    _, plain = digits(tmp_path / "plain", **{**options, "subset": 40})
    result, without = digits(tmp_path / "none", **options, labelled=40, unlabelled_share=0.0)
    assert same_weights(plain, without)
    assert result.images == {"labelled": 40, "unlabelled": 0}
    assert len(logged(result.folder)) == len(logged(tmp_path / "plain"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_that_of_a_plain_loop(settings, accumulate):
    """Cross-entropy of the labelled rows, divergence on all rows, by torch's own functions."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, 3, (50,), generator=random)
    names = ("a", "b", "c")
    labels = labels.where(torch.arange(50) % 3 == 0, IGNORED)
    images = ImageSet(images, labels, 3, names, (128.0,), (64.0,))

    def loader():
        sampler = MixedSampler(images.labels, 10, 6)
        return ResidentLoader(images, 10, seed=2, train=True, pad=1, sampler=sampler)

    def peers():
        torch.manual_seed(1)
        widths = (8, 12)
        return [
            nn.Sequential(nn.Flatten(), nn.Linear(16, w), nn.ReLU(), nn.Linear(w, 3)).double()
            for w in widths
        ]

    class Doubles(ResidentLoader):
        def _batch(self, pixels, samples):
            images, labels = super()._batch(pixels, samples)
            return images.double(), labels

    def doubles():
        found = loader()
        found.__class__ = Doubles
        return found

    # a learning rate that float32 holds exactly
    config = settings(lr=0.125, weight_decay=1e-3, epochs=2, accumulate=accumulate, batch_size=10)
    cohort = Cohort(peers(), 3)
    result = fit(cohort, doubles(), None, config)

    plain, records = peers(), []
    optimizers = [
        torch.optim.SGD(p.parameters(), 0.125, 0.9, weight_decay=1e-3, nesterov=True) for p in plain
    ]
    for epoch in range(2):
        for x, y in doubles().epoch(epoch):
            assert (y == IGNORED).sum() == 6
            logits = [peer(x) for peer in plain]
            logs = [z.detach().log_softmax(1) for z in logits]
            seen = []
            for k, optimizer in enumerate(optimizers):
                ce = F.cross_entropy(logits[k], y)
                kl = F.kl_div(
                    logits[k].log_softmax(1), logs[1 - k], log_target=True, reduction="batchmean"
                )
                optimizer.zero_grad()
                (ce + kl).backward()
                optimizer.step()
                right = (logits[k].argmax(1) == y).sum() / (y != IGNORED).sum()
                seen.append((ce.item(), kl.item(), right.item()))
            records.append(seen)
    for peer, own in zip(cohort.peers, plain, strict=True):
        for found, expected in zip(peer.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    means = np.array(records)[len(records) // 2 :].mean(0)
    for i, name in enumerate(("ce", "kl", "top1")):
        assert result.history[-1][name] == pytest.approx(means[:, i].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"loader": "resident", "independent": True, "ema": 0.9, "validation": 15.0},
        {"loader": "torch", "accumulate": 2, "epochs": 1},
        pytest.param({"loader": "dali", "unlabelled_share": 0.75, "epochs": 1}, marks=needs_dali),
    ],
    ids=lambda options: options["loader"],
)
def test_a_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, options):
    options = {**options, "labelled": 40, "save_every_steps": 1}
    whole, peers = digits(tmp_path / "whole", **options)
    with crashing(4 if "epochs" in options else 10):
        digits(tmp_path / "broken", **options)
    resumed, again = digits(tmp_path / "broken", **options, resume=True)
    assert same_weights(peers, again)
    assert logged(resumed.folder) == logged(whole.folder)
    images = 40 - int(options.get("validation", 0))
    expected = {"labelled": images, "unlabelled": 80}
    assert resumed.images == expected
    summary = json.loads((resumed.folder / "summary.json").read_text())
    assert summary["mutual"]["training_images"] == expected
    page = run_page.run_page(read_run(resumed.folder), SCORING)
    assert f"{images} with labels, 80 without" in page
    assert "Trained together on digits with 40 labels" in page
    assert f"{images} images with labels and 80 without" in str(resumed)
    if options.get("independent"):
        assert resumed.independent.images == expected
        assert resumed.scores.rows == whole.scores.rows


def test_executions_take_the_eager_steps(tmp_path):
    eager, *others = (
        digits(tmp_path / execution, labelled=40, epochs=1, execution=execution)[1]
        for execution in ("eager", "threads", "stacked")
    )
    for other in others:
        for a, b in zip(eager.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_labels_are_kept_evenly_by_the_seed_and_validation_is_taken_of_these():
    train, test = load_digits()
    labelled, rest = split_labelled(train, 50, seed=3)
    assert labelled.labels.bincount().tolist() == [5] * 10
    assert torch.equal(labelled.images, train.subset(50, seed=3).images)
    assert (rest.labels == IGNORED).all()
    assert len(rest) == len(train) - 50
    assert not torch.equal(split_labelled(train, 50, seed=4)[0].images, labelled.images)
    config = preset("digits", labelled=50, validation=0.2, seed=3, subset=0)
    sets, others = divided(Splits(train, None, test), config)
    expected = split_validation(labelled, 0.2, 3)
    assert torch.equal(sets.train.images, expected[0].images)
    assert torch.equal(sets.validation.images, expected[1].images)
    assert torch.equal(others.images, rest.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": 9}, "labelled=9 is fewer than the 10 classes: give at least one image of"),
        ({"labelled": 121}, "labelled=121 leaves none of the 120 training images without"),
        ({"labelled": 40, "unlabelled_share": 0.01}, "share 0.01 of batch_size 16 is 0"),
        (
            {"labelled": 40, "unlabelled_share": 0.99},
            "share 0.99 of batch_size 16 is 16",
        ),
        ({"labelled": -1}, "labelled must be 0 or more"),
        (
            {"unlabelled_share": 1.0, "labelled": 40},
            "share must be at least 0 and below",
        ),
        ({"unlabelled": "."}, "the set has images of 1 channel, 0 to 16, and files are in colours"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        digits(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_reidentification_needs_every_identity():
    for changes in ({"labelled": 10}, {"unlabelled": "images"}):
        name = next(iter(changes))
        with pytest.raises(InputError, match=f"{name} is for classification"):
            ReidConfig(**changes)


def test_fit_has_data_of_its_own_kind(settings):
    with pytest.raises(InputError, match=r"labelled=4 is for .* give the inputs without labels as"):
        fit(*_own(), settings(labelled=4))


def _own():
    x, y = torch.randn(32, 5), torch.arange(32) % 3
    return Cohort([nn.Linear(5, 3), nn.Linear(5, 3)], 3), (x, y), None
