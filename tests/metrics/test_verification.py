"""True positive rates at fixed false positive rates, against every threshold and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml.errors import InputError
from fastdml.metrics import feature_distances, reid_scores, verification
from fastdml.metrics.verification import Smallest, accepted_at

FPRS = (1e-4, 1e-3, 1e-2, 0.1)


def pairs(d, query_ids, gallery_ids, query_cameras, gallery_cameras):
    """Distances of genuine pairs and of impostors, of queries that have a match."""
    genuine, impostors = [], []
    for q in range(len(query_ids)):
        own = gallery_ids == query_ids[q]
        match = own & (gallery_cameras != query_cameras[q])
        if match.any():
            genuine.append(d[q][match])
            impostors.append(d[q][~own & (gallery_ids != -1)])
    return torch.cat(genuine).double(), torch.cat(impostors).double()


def by_every_threshold(genuine, impostors, fpr):
    """The highest true positive rate of a threshold, infinity among them, with few enough false
    positives; NaN is above all."""
    best = 0.0
    for t in [-math.inf, *torch.cat([genuine, impostors]).unique().tolist()]:
        if (impostors <= t).double().mean() <= fpr:
            best = max(best, (genuine <= t).double().mean().item())
    return best


def random_set(rng, Q, G, ids, cameras):
    return tuple(
        torch.from_numpy(rng.integers(*bounds, n))
        for bounds, n in (((1, ids), Q), ((-1, ids), G), ((1, cameras), Q), ((1, cameras), G))
    )


@settings(max_examples=60, deadline=None)
@given(
    G=st.integers(2, 60),
    levels=st.sampled_from([2, 6, 10**6]),  # few: equal distances
    block=st.sampled_from([1, 100, 1 << 20]),
    piece=st.sampled_from([1, 7, 1 << 20]),
    fprs=st.lists(st.sampled_from([0.0, 1e-3, 0.05, 0.25, 0.5, 1.0]), min_size=1, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_rates_are_those_of_the_best_threshold(G, levels, block, piece, fprs, seed):
    rng = np.random.default_rng(seed)
    labels = random_set(rng, 6, G, 5, 4)
    d = torch.from_numpy(rng.integers(-levels, levels, (6, G)) / levels)
    try:
        reid_scores(None, None, *labels, distances=d)
    except InputError:
        return
    genuine, impostors = pairs(d, *labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "PIECE", piece)
        found = reid_scores(None, None, *labels, distances=d, fprs=fprs, block=block)
    assert list(found.tpr) == fprs
    for fpr, rate in found.tpr.items():
        if len(impostors):
            assert rate == pytest.approx(by_every_threshold(genuine, impostors, fpr), abs=1e-12)
        else:
            assert math.isnan(rate)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_features_against_scikit_learn(metric):
    """One threshold for all queries: what orders a single query's gallery does not suffice."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = random_set(rng, 60, 800, 15, 5)
    who = torch.from_numpy(rng.standard_normal((15, 8)))
    q, g = (
        who[ids] * torch.from_numpy(rng.uniform(0.5, 2, (len(ids), 1)))
        + 0.5 * torch.from_numpy(rng.standard_normal((len(ids), 8)))
        for ids in labels[:2]
    )
    scores = reid_scores(q, g, *labels, metric=metric, fprs=FPRS, block=5_000)
    genuine, impostors = pairs(feature_distances(q, g, metric), *labels)
    truth = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostors))])
    fpr, tpr, _ = sklearn.roc_curve(
        truth, -torch.cat([genuine, impostors]).numpy(), drop_intermediate=False
    )
    for wanted, rate in scores.tpr.items():
        assert rate == pytest.approx(tpr[fpr <= wanted].max(), abs=1e-12)
    assert 0 < scores.tpr[1e-3] < scores.tpr[0.1] < 1
    plain = reid_scores(q, g, *labels, metric=metric, block=5_000)
    assert (plain.mAP, plain.cmc, plain.tpr) == (scores.mAP, scores.cmc, {})


def test_the_same_camera_and_junk_are_no_pairs():
    ids, cameras = torch.tensor([7, 7, 8, 8, -1]), torch.tensor([1, 2, 1, 2, 2])
    one = torch.tensor([7]), ids, torch.tensor([1]), cameras
    d = torch.tensor([[0.9, 0.2, 0.1, 0.3, 0.0]])  # own camera, match, two impostors, junk
    tpr = reid_scores(None, None, *one, distances=d, fprs=(0.0, 0.49, 0.5)).tpr
    assert tpr == {0.0: 0.0, 0.49: 0.0, 0.5: 1.0}
    tpr = reid_scores(None, None, *one, distances=d / 0, fprs=(0.5, 1.0)).tpr  # NaN and infinity
    assert tpr == {0.5: 0.0, 1.0: 1.0}


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    piece=st.sampled_from([1, 5, 1 << 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_smallest_are_exact_and_few_are_held(count, sizes, piece, seed):
    rng = np.random.default_rng(seed)
    blocks = [torch.from_numpy(rng.integers(0, 30, n).astype(np.float32)) for n in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "PIECE", piece)
        smallest = Smallest(count)
        for block in blocks:
            smallest.add(block)
            assert sum(map(len, smallest.parts)) < 2 * count + piece
        found = smallest.sorted()
    expected = torch.cat(blocks).sort().values[:count]
    assert torch.equal(found, expected)


def test_accepted_impostors_are_counted_without_rounding():
    for impostors in (*range(1, 300), 10_000, 958_000_000):
        for fpr in (0.0, 1e-4, 1e-3, 1e-2, 0.07, 0.3, 1 / 3, 1.0):
            k = accepted_at(fpr, impostors)
            assert k / impostors <= fpr
            assert k == impostors or (k + 1) / impostors > fpr


def test_wrong_rates_are_named():
    one = torch.tensor([1])
    with pytest.raises(InputError, match=r"false positive rate of 1\.5: give numbers within 0"):
        reid_scores(None, None, one, one, one, one + 1, distances=torch.ones(1, 1), fprs=(1.5,))
