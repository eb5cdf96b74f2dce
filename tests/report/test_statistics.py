"""Intervals, accuracy by class, confusion and calibration, against scipy, scikit-learn and loops in
float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import predictions

from fastdml.metrics import Classification
from fastdml.report.statistics import (
    binomial_interval,
    calibration,
    class_accuracy,
    class_counts,
    confusion,
    most_confused,
    paired_interval,
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 20_000), share=st.floats(0, 1))
def test_binomial_interval_is_scipys_wilson(n, share):
    stats = pytest.importorskip("scipy.stats")
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert binomial_interval(k / n, n) == pytest.approx(
        (expected.low, expected.high), rel=1e-9, abs=1e-12
    )


def test_binomial_interval_covers_what_it_says():
    """Of 4000 samples from a known share, about 95 % give an interval that holds it."""
    random = np.random.default_rng(0)
    share, n = 0.9, 355
    held = [
        low <= share <= high
        for low, high in (binomial_interval(k / n, n) for k in random.binomial(n, share, 4000))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_intervals_of_nothing():
    assert all(math.isnan(v) for v in binomial_interval(0.5, 0))
    assert all(math.isnan(v) for v in binomial_interval(math.nan, 9))
    assert all(math.isnan(v) for v in paired_interval(np.ones(1), np.zeros(1)))


def test_paired_interval_is_scipys_of_the_differences():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    a, b = random.integers(0, 2, (2, 500)).astype(bool)
    gap = a.astype(float) - b
    expected = stats.norm.interval(0.95, gap.mean(), gap.std(ddof=1) / math.sqrt(500))
    assert paired_interval(a, b) == pytest.approx(expected, rel=1e-9)


def test_paired_interval_of_as_many_answers_an_image_is_the_plain_one():
    random = np.random.default_rng(1)
    a, b = random.random((2, 50))
    for count in (1, 3):
        of_counts = paired_interval(a, b, np.full(50, count))
        assert of_counts == pytest.approx(paired_interval(a, b), rel=1e-12)


def test_paired_interval_covers_what_it_says_where_images_have_unlike_numbers_of_answers():
    """Answers about an image share its luck; 95 % of the intervals hold the true gain, 0.1."""
    random = np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        counts = random.integers(1, 6, 120)
        luck = 0.1 + random.normal(0, 0.3, 120)
        gap = luck + random.normal(0, 0.2, 120) / np.sqrt(counts)
        low, high = paired_interval(gap, np.zeros(120), counts)
        held += low <= 0.1 <= high
    assert held / 1000 == pytest.approx(0.95, abs=0.025)


def test_classes_and_confusion_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    found = predictions(K=2, N=300, C=5)
    for row in range(3):
        expected = sklearn.confusion_matrix(found.label, found.top[row], labels=range(5))
        assert confusion(found, row).tolist() == expected.tolist()
        share = expected.diagonal() / expected.sum(axis=1)
        assert class_accuracy(found)[row] == pytest.approx(share)
    matrix = confusion(found)
    pairs = most_confused(found, 1000)
    assert {(p.true, p.said): p.images for p in pairs} == {
        (i, j): matrix[i, j] for i in range(5) for j in range(5) if i != j and matrix[i, j]
    }
    assert [p.images for p in pairs] == sorted((p.images for p in pairs), reverse=True)
    assert (
        pairs[0].share == matrix[pairs[0].true, pairs[0].said] / class_counts(found)[pairs[0].true]
    )


@pytest.mark.parametrize("seed", range(6))
def test_calibration_is_that_of_the_scores(seed):
    """ECE and NLL from kept rows equal those that the evaluation sums up, and float64 loops."""
    random = np.random.default_rng(seed)
    K, N, C = 2, 400, 6
    logits = (2.5 * random.standard_normal((K, N, C))).astype(np.float32)
    labels = torch.tensor(random.integers(0, C, N))
    counts = Classification(K, C, keep=True)
    counts.update([torch.tensor(z) for z in logits], labels)
    scores, rows = counts.compute(), counts.kept_rows()
    found = dataclasses.replace(
        predictions(K=K, N=N, C=C, pictures=0),
        label=rows.label.numpy().astype(np.int32),
        top=rows.top.numpy().astype(np.int32),
        confidence=rows.confidence.numpy(),
        label_log=rows.label_log.numpy(),
    )
    for row, (ece, nll) in enumerate(
        zip([*scores.ece, scores.ensemble_ece], [*scores.nll, scores.ensemble_nll], strict=True)
    ):
        of = calibration(found, row)
        assert of.ece == pytest.approx(ece, abs=1e-7)
        assert of.nll == pytest.approx(nll, abs=1e-6)
        assert of.ece == pytest.approx(ece_by_hand(found, row), abs=1e-7)
        assert sum(part.images for part in of.bins) == N


def ece_by_hand(found, row) -> float:
    total, n = 0.0, len(found.label)
    for m in range(15):
        inside = [i for i in range(n) if m / 15 < float(found.confidence[row, i]) <= (m + 1) / 15]
        if inside:
            right = sum(found.top[row, i] == found.label[i] for i in inside) / len(inside)
            sure = sum(float(found.confidence[row, i]) for i in inside) / len(inside)
            total += len(inside) / n * abs(right - sure)
    return total


def test_what_is_not_a_number_is_not_hidden():
    found = predictions(N=10)
    found.top[0, 3], found.confidence[0, 3], found.label_log[0, 3] = -1, math.nan, math.nan
    of = calibration(found, 0)
    assert math.isnan(of.ece)
    assert math.isnan(of.nll)
    assert sum(part.images for part in of.bins) == 9
    assert confusion(found, 0).sum() == 9
    assert not math.isnan(calibration(found, 1).ece)


def test_a_class_without_images_has_no_accuracy():
    found = dataclasses.replace(predictions(C=2), num_classes=3, classes=())
    assert np.isnan(class_accuracy(found)[:, 2]).all()
    assert class_counts(found)[2] == 0
