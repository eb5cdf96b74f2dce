"""k-reciprocal re-ranking against a dense float64 reference written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdml.errors import InputError
from fastdml.metrics import (
    feature_distances,
    k_reciprocal_rerank,
    reid_scores,
    rerank_distances,
)


def reference(query, gallery, k1, k2, weight) -> np.ndarray:
    """(Q, G), of features."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    return of_distances(((x[:, None] - x[None]) ** 2).sum(axis=2), len(query), k1, k2, weight)


def of_distances(d, Q, k1, k2, weight) -> np.ndarray:
    """(Q, G), of squared distances (N, N), with sets of neighbours and full matrices."""
    N = len(d)
    order = [sorted(range(N), key=lambda j: (j != i, d[i, j])) for i in range(N)]
    d = d / d.max(axis=1, keepdims=True)

    def reciprocal(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    V = np.zeros((N, N))
    for i in range(N):
        near = reciprocal(i, k1)
        members = set(near)
        for j in near:
            candidates = reciprocal(j, round(k1 / 2))
            if 3 * len(candidates & near) > 2 * len(candidates):
                members |= candidates
        for j in members:
            V[i, j] = math.exp(-d[i, j])
        V[i] /= V[i].sum()
    V = np.stack([V[order[i][:k2]].mean(axis=0) for i in range(N)])
    least, most = (f(V[:Q, None], V[None, Q:]).sum(axis=2) for f in (np.minimum, np.maximum))
    return (1 - weight) * (1 - least / most) + weight * d[:Q, Q:]


def nearly_tied(x: np.ndarray) -> bool:
    """Whether rounding to fp32 may reorder an image's neighbours."""
    d = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    gaps = np.diff(np.sort(d, axis=1), axis=1)
    return len(x) > 1 and gaps.min() < 1e-5 * d.max()


def clusters(rng, N, D, people, spread=0.3) -> np.ndarray:
    centers = rng.standard_normal((people, D))
    x = centers[rng.integers(0, people, N)] + spread * rng.standard_normal((N, D))
    return x.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    Q=st.integers(1, 8),
    G=st.integers(1, 30),
    D=st.integers(2, 6),
    k1=st.integers(1, 12),
    k2=st.integers(1, 8),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    people=st.integers(1, 6),
    block=st.sampled_from([1, 50, 300, 1 << 22]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equal_to_the_dense_reference(Q, G, D, k1, k2, weight, people, block, seed):
    x = clusters(np.random.default_rng(seed), Q + G, D, people)
    assume(not nearly_tied(x.astype(np.float64)))
    query, gallery = torch.from_numpy(x[:Q]), torch.from_numpy(x[Q:])
    found = k_reciprocal_rerank(query, gallery, k1, k2, weight, block=block)
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(reference(x[:Q], x[Q:], k1, k2, weight), abs=1e-5)


def matrices(d, Q):
    """Between queries and gallery, between queries, within the gallery."""
    return d[:Q, Q:], d[:Q, :Q], d[Q:, Q:]


@settings(max_examples=60, deadline=None)
@given(
    Q=st.integers(1, 8),
    G=st.integers(1, 30),
    k1=st.integers(1, 12),
    k2=st.integers(1, 8),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    block=st.sampled_from([1, 50, 300, 1 << 22]),
    symmetric=st.booleans(),
    as_arrays=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_given_distances_are_the_authors_formula_in_float64(
    Q, G, k1, k2, weight, block, symmetric, as_arrays, seed
):
    """Of distances that come from no features, with columns that differ from the rows."""
    rng = np.random.default_rng(seed)
    x = clusters(rng, Q + G, 3, 4).astype(np.float64)
    d = np.linalg.norm(x[:, None] - x[None], axis=2)
    if not symmetric:
        apart = d * rng.uniform(1, 1.3, d.shape)
        d[:Q, :Q], d[Q:, Q:] = apart[:Q, :Q], apart[Q:, Q:]
    given_ = [np.ascontiguousarray(part) for part in matrices(d, Q)]
    kept = [part.copy() for part in given_]
    arguments = given_ if as_arrays else [torch.from_numpy(part) for part in given_]
    found = rerank_distances(*arguments, k1, k2, weight, block=block)
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(of_distances(d.T**2, Q, k1, k2, weight), abs=1e-12)
    assert all(np.array_equal(*pair) for pair in zip(given_, kept, strict=True))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_what_cannot_be_squared_is_refused(metric):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="2 of 2 query features are too large to be squared in"):
        k_reciprocal_rerank(1e20 * x[:2], x[2:], metric=metric)
    d = torch.cdist(x, x) * 1e25
    with pytest.raises(InputError, match=r"distances too large for torch\.float32, in which they"):
        rerank_distances(*matrices(d, 2))
    exact = rerank_distances(*matrices(d.double(), 2))
    assert torch.allclose(exact.float(), rerank_distances(*matrices(d / 1e25, 2)), atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_features_and_their_distances_give_the_same(metric):
    x = torch.from_numpy(clusters(np.random.default_rng(5), 120, 16, 9))
    q, g = x[:20], x[20:]
    pairs = [(q, g), (q, q), (g, g)]
    exact = [feature_distances(a.double(), b.double(), metric) for a, b in pairs]
    expected = rerank_distances(*exact, 10, 4)
    found = k_reciprocal_rerank(q, g, 10, 4, metric=metric)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5)
    d = feature_distances(x.double(), x.double(), metric).fill_diagonal_(0).numpy()
    assert expected.numpy() == pytest.approx(of_distances(d**2, 20, 10, 4, 0.3), abs=1e-7)
    single = rerank_distances(*(part.float() for part in exact), 10, 4)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), expected, rtol=0, atol=1e-5)


def test_the_cosine_leaves_lengths_out():
    x = torch.from_numpy(clusters(np.random.default_rng(6), 60, 8, 6))
    scaled = x * torch.linspace(0.1, 10, 60)[:, None]
    found, other = (k_reciprocal_rerank(y[:9], y[9:], 6, 3, metric="cosine") for y in (x, scaled))
    assert torch.allclose(found, other, rtol=0, atol=1e-5)
    assert not torch.allclose(found, k_reciprocal_rerank(x[:9], x[9:], 6, 3), atol=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("block", [20_000, 1 << 22])
def test_a_larger_set_with_the_usual_settings(block):
    x = clusters(np.random.default_rng(0), 300, 32, 20)
    found = k_reciprocal_rerank(torch.from_numpy(x[:60]), torch.from_numpy(x[60:]), block=block)
    assert found.numpy() == pytest.approx(reference(x[:60], x[60:], 20, 6, 0.3), abs=1e-5)


def test_it_raises_map_where_neighbours_help(people):
    query, gallery, labels = people
    plain = reid_scores(query, gallery, *labels)
    ranked = reid_scores(None, None, *labels, distances=k_reciprocal_rerank(query, gallery))
    assert plain.mAP + 0.03 < ranked.mAP < 1


def test_images_that_are_all_alike_or_twice_there():
    alike = torch.ones(30, 4)
    found = k_reciprocal_rerank(alike[:3], alike, 5, 2)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found <= 1).all()
    x = torch.from_numpy(clusters(np.random.default_rng(2), 60, 8, 6))
    twice = k_reciprocal_rerank(x[:10], torch.cat([x, x]), 6, 3)  # queries are in the gallery, too
    assert twice.isfinite().all()
    assert twice[:, :60] == pytest.approx(twice[:, 60:], abs=0.5)
    nearest = twice.argmin(dim=1) % 60
    assert torch.equal(nearest, torch.arange(10))


def test_any_floating_dtype_and_more_neighbours_than_images():
    x = torch.from_numpy(clusters(np.random.default_rng(3), 12, 4, 3))
    expected = k_reciprocal_rerank(x[:2], x[2:], 20, 6)
    assert torch.equal(k_reciprocal_rerank(x[:2].double(), x[2:], 20, 6), expected)
    half = x.half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = k_reciprocal_rerank(half[:2].requires_grad_(), half[2:], 20, 6)
    assert torch.equal(found, k_reciprocal_rerank(half[:2].float(), half[2:].float(), 20, 6))
    assert not found.requires_grad


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONES, torch.ones(3, 4)), {}, r"\(3, 2\) and \(3, 4\)"),
        ((ONES, torch.ones(0, 2)), {}, "3 queries against 0 gallery images"),
        ((ONES, ONES), {"k1": 0}, "k1=0"),
        ((ONES, ONES), {"k2": 0}, "k2=0"),
        ((ONES, ONES), {"block": 0}, "block=0"),
        ((ONES, ONES), {"lambda_value": 1.5}, r"lambda_value=1\.5"),
        ((ONES, ONES / 0), {}, "3 of 3 gallery features are not finite"),
        ((ONES * math.nan, ONES), {}, "3 of 3 query features are not finite"),
        ((ONES, ONES), {"metric": "hamming"}, "unknown metric 'hamming'"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        k_reciprocal_rerank(*arguments, **options)


BETWEEN, SQUARE = torch.ones(2, 3), torch.ones(3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BETWEEN, SQUARE, SQUARE), r"distances \(2, 3\), \(3, 3\) and \(3, 3\): give \(Q, G\)"),
        ((BETWEEN[0], SQUARE, SQUARE), r"distances \(3,\), "),
        ((BETWEEN, SQUARE[:2, :2], SQUARE / 0), r"9 of the distances \(G, G\) are not finite"),
        ((BETWEEN * math.nan, SQUARE[:2, :2], SQUARE), r"6 of the distances \(Q, G\) are"),
        ((BETWEEN, SQUARE[:2, :2], SQUARE, 0), "k1=0"),
    ],
)
def test_wrong_distances_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        rerank_distances(*arguments)


@pytest.mark.gpu
def test_the_same_distances_on_a_gpu():
    x = torch.from_numpy(clusters(np.random.default_rng(4), 2_000, 64, 120))
    expected = k_reciprocal_rerank(x[:300], x[300:])
    found = k_reciprocal_rerank(x[:300].cuda(), x[300:].cuda(), block=1 << 18).cpu()
    # another order of summation swaps a few nearly equal neighbours
    assert ((found - expected).abs() > 1e-4).double().mean() < 1e-3
