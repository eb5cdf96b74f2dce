"""What the benchmarks of re-identification measure against computes the same as ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.baselines import (
    reid_argsort,
    reid_cython,
    reid_dense_rerank,
    reid_loop,
    reid_losses,
    reid_torchreid,
)
from fastdml import metrics
from fastdml.metric_losses import CenterLoss, triplet_loss


@pytest.fixture(scope="module")
def people():
    """Features and labels of 30 queries and 300 gallery images, with junk and distractors."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, n: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    labels = draw(1, 26, 30), draw(-1, 21, 300), draw(1, 4, 30), draw(1, 4, 300)
    who = torch.randn(27, 16, generator=generator)
    query, gallery = (
        who[ids + 1] + torch.randn(len(ids), 16, generator=generator) for ids in labels[:2]
    )
    return query, gallery, labels


@pytest.mark.parametrize("rival", [reid_argsort, reid_loop, reid_torchreid])
def test_scores(people, rival):
    query, gallery, labels = people
    d = metrics.feature_distances(query, gallery)
    ours = metrics.reid_scores(None, None, *labels, distances=d)
    assert 0 < ours.queries < 30
    arguments = (d, *labels)
    if rival is not reid_argsort:
        arguments = tuple(x.numpy() for x in arguments)
    assert rival.scores(*arguments) == pytest.approx((ours.mAP, ours.rank(1)), abs=1e-6)


def stand_in_for_rank_cy(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, top):
    """What torchreid's evaluator returns, and fast-reid's, which has a value a query."""
    mAP, first = reid_loop.scores(distances, query_ids, gallery_ids, query_cameras, gallery_cameras)
    assert top == 50
    return np.array([first], np.float32), mAP


def test_a_compiled_evaluator_is_found_in_a_package_and_asked_without_junk(
    people, tmp_path, monkeypatch
):
    query, gallery, labels = people
    d = metrics.feature_distances(query, gallery)
    ours = metrics.reid_scores(None, None, *labels, distances=d)
    monkeypatch.setattr(reid_cython, "evaluator", lambda: stand_in_for_rank_cy)
    found = reid_cython.scores(d.numpy(), *(x.numpy() for x in labels))
    assert found == pytest.approx((ours.mAP, ours.rank(1)), abs=1e-6)
    monkeypatch.undo()
    (tmp_path / "torchreid/metrics").mkdir(parents=True)
    (tmp_path / "torchreid/metrics/rank_cy.py").write_text("def evaluate_cy(): return 'compiled'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reid_cython, "EXTENSION_SUFFIXES", [".py"])
    assert reid_cython.evaluator.__wrapped__()() == "compiled"


def test_dense_reranking(people):
    query, gallery, _ = people
    dense = reid_dense_rerank.rerank(query, gallery)
    assert metrics.k_reciprocal_rerank(query, gallery).numpy() == pytest.approx(dense, abs=1e-5)


def test_losses():
    labels = torch.arange(8).repeat_interleave(4)
    features = torch.randn(32, 24, dtype=torch.float64)
    assert torch.allclose(reid_losses.triplet(features, labels), triplet_loss(features, labels))
    ours = CenterLoss(8, 24).double().eval()
    ours.centers.normal_()
    usual = reid_losses.center(features, labels, ours.centers)
    assert torch.allclose(usual, ours(features, labels))


def test_sampler_shows_a_few_images_of_each_identity():
    pytest.importorskip("torchvision")
    from bench.baselines.reid_training import RandomIdentitySampler

    labels = [i % 7 for i in range(70)]
    order = list(RandomIdentitySampler(labels, 12, 4))
    assert len(set(order)) == len(order)
    for at in range(0, len(order) // 12 * 12, 4):
        assert len({labels[place] for place in order[at : at + 4]}) == 1
    first = {labels[place] for place in order[:12]}
    assert len(first) == 3
