"""Retrieval scores against a slow reference written from the definitions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastdml.data import load_digits
from fastdml.errors import InputError
from fastdml.metrics import (
    ReIDScores,
    ensemble_features,
    feature_distances,
    multi_query_features,
    normalize_features,
    reid,
    reid_scores,
)


def reference(
    distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank, ties="worst"
):
    """mAP, CMC, mINP and the number of queries, from ranked lists. None where nothing counts."""
    precisions, penalties, firsts = [], [], []
    for q, (identity, camera) in enumerate(zip(query_ids, query_cameras, strict=True)):
        ranked = []  # (distance, what equal ones are sorted by, is a match)
        for g, (other, other_camera) in enumerate(zip(gallery_ids, gallery_cameras, strict=True)):
            if other == -1 or (other == identity and other_camera == camera):
                continue
            d = float(distances[q][g])
            match = bool(other == identity)
            ranked.append(
                (math.inf if math.isnan(d) else d, match if ties == "worst" else g, match)
            )
        ranked.sort()
        places = [place for place, (*_, match) in enumerate(ranked, 1) if match]
        if not places:
            continue
        precisions.append(np.mean([n / place for n, place in enumerate(places, 1)]))
        penalties.append(len(places) / places[-1])
        firsts.append(places[0])
    if not precisions:
        return None
    cmc = [np.mean([first <= k for first in firsts]) for k in range(1, max_rank + 1)]
    return np.mean(precisions), cmc, np.mean(penalties), len(precisions)


def assert_equal(scores: ReIDScores, expected) -> None:
    mean, cmc, penalty, queries = expected
    assert scores.mAP == pytest.approx(mean, abs=1e-6)
    assert scores.cmc == pytest.approx(cmc, abs=1e-6)
    assert scores.mINP == pytest.approx(penalty, abs=1e-6)
    assert scores.queries == queries


def random_set(rng, Q, G, ids, cameras):
    """Identities -1 to `ids`, so junk and distractors among them, and queries nobody matches."""
    return tuple(
        torch.from_numpy(x)
        for x in (
            rng.integers(1, ids + 1, Q),
            rng.integers(-1, ids + 1, G),
            rng.integers(1, cameras + 1, Q),
            rng.integers(1, cameras + 1, G),
        )
    )


@settings(max_examples=150, deadline=None)
@given(
    Q=st.integers(1, 8),
    G=st.integers(1, 30),
    ids=st.integers(1, 6),
    cameras=st.integers(1, 3),
    levels=st.sampled_from([1, 2, 5, 10**6]),  # of distance: few make ties
    holes=st.sampled_from([0.0, 0.2]),  # NaN and infinities
    block=st.sampled_from([1, 40, 1 << 20]),
    comparisons=st.sampled_from([1, 7, 64, 1 << 20]),
    narrow=st.sampled_from([1, 3, 8, 256]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    max_rank=st.integers(1, 40),
    ties=st.sampled_from(["worst", "given"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(1, 1, 1, 1, 1, 0.0, 1, 1, 256, torch.float32, 1, "worst", 0)
def test_scores_match_the_definitions(
    Q, G, ids, cameras, levels, holes, block, comparisons, narrow, dtype, max_rank, ties, seed
):
    rng = np.random.default_rng(seed)
    labels = random_set(rng, Q, G, ids, cameras)
    d = torch.from_numpy(rng.integers(-levels, levels, (Q, G)) / levels).to(dtype)
    for value in (math.nan, math.inf, -math.inf):
        d[torch.from_numpy(rng.random((Q, G)) < holes / 3)] = value
    given_, expected = d.clone(), reference(d, *(x.tolist() for x in labels), max_rank, ties)
    options = {"distances": d, "max_rank": max_rank, "block": block, "ties": ties}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reid.COMPARISONS, "cpu", comparisons)
        patch.setattr(reid, "NARROW", narrow)
        patch.setattr(reid, "NEARBY", comparisons)
        if expected is None:
            with pytest.raises(InputError, match=f"none of the {Q} queries"):
                reid_scores(None, None, *labels, **options)
            return
        scores = reid_scores(None, None, *labels, **options)
    assert_equal(scores, expected)
    assert torch.equal(
        d.view(torch.uint8), given_.view(torch.uint8)
    )  # what was given is not written over


@settings(max_examples=40, deadline=None)
@given(
    Q=st.integers(1, 6),
    G=st.integers(1, 25),
    D=st.integers(2, 5),
    metric=st.sampled_from(["cosine", "euclidean"]),
    whole=st.booleans(),  # small whole numbers: exact ties
    seed=st.integers(0, 2**32 - 1),
)
def test_features_match_the_definitions(Q, G, D, metric, whole, seed):
    rng = np.random.default_rng(seed)
    labels = random_set(rng, Q, G, 3, 2)
    q, g = rng.standard_normal((Q, D)), rng.standard_normal((G, D))
    if whole and metric == "euclidean":
        q, g = np.rint(2 * q), np.rint(2 * g)  # squares and products are exact
    if metric == "cosine":
        d = [[-(a @ b) / np.linalg.norm(b) for b in g] for a in q]
    else:
        d = [[np.sum((a - b) ** 2) for b in g] for a in q]
    expected = reference(d, *(x.tolist() for x in labels), 10)
    if expected is None:
        return
    q, g = torch.from_numpy(q), torch.from_numpy(g)
    assert_equal(reid_scores(q, g, *labels, metric=metric, max_rank=10, block=50), expected)


def test_a_worked_example():
    # id 7 asks from camera 1: its own camera (0.0) and junk (0.1) are left out; then a stranger,
    # a match, a distractor, a match: ranks 2 and 4.
    d = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    ids, cameras = torch.tensor([7, -1, 8, 7, 0, 7]), torch.tensor([1, 2, 2, 2, 1, 3])
    scores = reid_scores(
        None, None, torch.tensor([7]), ids, torch.tensor([1]), cameras, distances=d, max_rank=5
    )
    assert scores == ReIDScores(mAP=(1 / 2 + 2 / 4) / 2, cmc=[0, 1, 1, 1, 1], mINP=2 / 4, queries=1)
    assert scores.rank(1) == 0
    assert scores.rank(5) == 1
    for k in (0, 6):
        with pytest.raises(InputError, match=f"rank {k}: this curve has ranks 1 to 5"):
            scores.rank(k)


def test_perfect_and_collapsed_features():
    ids = torch.arange(1, 11).repeat_interleave(4)
    cameras = torch.tensor([1, 2, 3, 4]).repeat(10)
    labels = ids[::4], ids, cameras[::4], cameras
    perfect = torch.eye(11)[ids]
    scores = reid_scores(perfect[::4], perfect, *labels)
    assert (scores.mAP, scores.mINP, scores.rank(1), scores.queries) == (1, 1, 1, 10)
    for value in (1.0, math.nan):  # all alike: worse than chance, never by luck of the order
        alike = torch.full_like(perfect, value)
        scores = reid_scores(alike[::4], alike, *labels, max_rank=37)
        assert scores.cmc == [0.0] * 36 + [1.0]
        assert scores.mINP == pytest.approx(3 / 39)


def test_scores_do_not_depend_on_the_order_of_gallery_or_queries():
    rng = np.random.default_rng(0)
    labels = random_set(rng, 60, 300, 20, 4)
    d = torch.from_numpy(rng.integers(0, 40, (60, 300)) / 40)
    scores = reid_scores(None, None, *labels, distances=d)
    q, g = torch.randperm(60), torch.randperm(300)
    shuffled = (labels[0][q], labels[1][g], labels[2][q], labels[3][g])
    other = reid_scores(None, None, *shuffled, distances=d[q][:, g])
    assert other.cmc == scores.cmc
    assert other.mAP == pytest.approx(scores.mAP, abs=1e-12)
    assert other.mINP == pytest.approx(scores.mINP, abs=1e-12)


def usual(distances, query_ids, gallery_ids, query_cameras, gallery_cameras):
    """mAP and rank-1 by the usual loop over queries (torchreid and most since), its argsort made a
    stable one."""
    order = np.argsort(distances, axis=1, kind="stable")
    precisions, firsts = [], []
    for q, row in enumerate(order):
        own = gallery_ids[row] == query_ids[q]
        found = own[~(own & (gallery_cameras[row] == query_cameras[q]))]
        if found.any():
            precisions.append(((found.cumsum() / np.arange(1, len(found) + 1)) * found).sum())
            precisions[-1] /= found.sum()
            firsts.append(found[0])
    return np.mean(precisions), np.mean(firsts)


@pytest.mark.parametrize("shuffled", [False, True])
def test_binary_features_under_both_rules_of_ties(shuffled):
    """64 bits, with few values of the distance: the order of the gallery decides, or nothing."""
    rng = np.random.default_rng(5)
    q_ids, g_ids, q_cameras, g_cameras = random_set(rng, 40, 400, 8, 3)
    g_ids = g_ids.clamp(min=0)
    if not shuffled:
        g_ids = g_ids.sort().values
    bits = torch.from_numpy(rng.integers(0, 2, (9, 12)))
    noise = [torch.from_numpy(rng.random((n, 12)) < 0.2) for n in (40, 400)]
    q, g = ((bits[i] ^ n).float() for i, n in zip((q_ids, g_ids), noise, strict=True))
    labels = q_ids, g_ids, q_cameras, g_cameras
    hamming = (q[:, None] != g[None]).sum(dim=2).float()
    given = reid_scores(q, g, *labels, metric="euclidean", ties="given")
    assert (given.mAP, given.rank(1)) == pytest.approx(
        usual(hamming.numpy(), *(x.numpy() for x in labels)), abs=1e-12
    )
    assert given == reid_scores(None, None, *labels, distances=hamming, ties="given")
    worst = reid_scores(q, g, *labels, metric="euclidean")
    assert worst.mAP < given.mAP - 0.01


def test_both_rules_agree_without_ties():
    rng = np.random.default_rng(6)
    labels = random_set(rng, 30, 500, 20, 4)
    d = torch.from_numpy(rng.permutation(15_000).reshape(30, 500) / 15_000)
    worst, given = (
        reid_scores(None, None, *labels, distances=d, ties=ties) for ties in ("worst", "given")
    )
    assert worst == given


def test_the_scores_of_a_monotone_function_of_the_distance_are_the_same():
    rng = np.random.default_rng(1)
    labels = random_set(rng, 50, 400, 10, 3)
    q, g = torch.randn(50, 16).double(), torch.randn(400, 16).double()
    for metric in ("cosine", "euclidean"):
        d = feature_distances(q, g, metric)
        direct = torch.cdist(q, g)
        if metric == "cosine":
            direct = torch.cdist(normalize_features(q), normalize_features(g)).square() / 2
        assert torch.allclose(d, direct, atol=1e-7)
        scores = reid_scores(q, g, *labels, metric=metric)
        assert reid_scores(None, None, *labels, distances=d.exp()) == scores
    # of unit length both metrics order alike
    q, g = normalize_features(q), normalize_features(g)
    assert reid_scores(q, g, *labels, metric="cosine") == reid_scores(
        q, g, *labels, metric="euclidean"
    )


def test_a_larger_set_in_blocks_equals_the_reference():
    rng = np.random.default_rng(2)
    labels = random_set(rng, 150, 2_000, 60, 6)
    d = torch.from_numpy(rng.random((150, 2_000), dtype=np.float32))
    expected = reference(d, *(x.tolist() for x in labels), 50)
    assert_equal(reid_scores(None, None, *labels, distances=d), expected)
    assert_equal(reid_scores(None, None, *labels, distances=d, block=7_000), expected)
    strided = torch.stack([d, d + 1], dim=2)[:, :, 0]
    small = (x.to(torch.int32) for x in labels)
    assert_equal(reid_scores(None, None, *small, distances=strided), expected)


def test_features_of_half_precision_and_under_autocast():
    rng = np.random.default_rng(3)
    labels = random_set(rng, 40, 200, 10, 3)
    q, g = torch.randn(40, 64).half(), torch.randn(200, 64).half()
    expected = reid_scores(q.double(), g.double(), *labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reid_scores(q.requires_grad_(), g, *labels) == expected
        assert reid_scores(q.double(), g, *labels) == expected


def test_handwritten_digits_by_their_pixels():
    """Real images, with many matches and ties that are exact."""
    pytest.importorskip("sklearn")
    train, test = load_digits()
    q, g = (x.images.flatten(1).double() for x in (test.subset(40), train.subset(500)))
    ids, gallery_ids = test.subset(40).labels + 1, train.subset(500).labels + 1
    labels = ids, gallery_ids, torch.arange(40) % 6, torch.arange(500) % 6
    scores = reid_scores(q, g, *labels, metric="euclidean")
    d = torch.cdist(q, g, compute_mode="donot_use_mm_for_euclid_dist").square().round()
    assert_equal(scores, reference(d, *(x.tolist() for x in labels), 50))
    assert scores.rank(1) > 0.8  # nearest neighbours know digits
    collapsed = reid_scores(q * 0, g * 0, *labels, metric="euclidean")
    assert collapsed.mAP < 0.1 < scores.mAP


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            # of a view the elements are those of what it views
            if isinstance(x, torch.Tensor) and not function.is_view:
                self.elements = max(self.elements, x.numel())
        return made


def test_no_tensor_is_larger_than_a_block(monkeypatch):
    Q, G, block = 20, 5_000, 20_000
    monkeypatch.setitem(reid.COMPARISONS, "cpu", block)
    labels = random_set(np.random.default_rng(4), Q, G, 50, 6)
    d, q, g = torch.rand(Q, G), torch.randn(Q, 2), torch.randn(G, 2)
    for arguments, options in (((None, None), {"distances": d}), ((q, g), {})):
        with Largest() as largest:
            reid_scores(*arguments, *labels, block=block, **options)
        assert G <= largest.elements <= block


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(0, 20),
    Q=st.integers(1, 8),
    own=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_multi_query_is_the_mean_of_the_images_of_an_identity_and_camera(M, Q, own, dtype, seed):
    rng = np.random.default_rng(seed)
    ids, cameras = rng.integers(-1, 4, M), rng.integers(1, 3, M)
    query_ids, query_cameras = rng.integers(1, 4, Q), rng.integers(1, 3, Q)
    features = torch.from_numpy(rng.standard_normal((M, 3))).to(dtype)
    query_features = torch.from_numpy(rng.standard_normal((Q, 3))).to(dtype)
    expected, missing = [], 0
    for q in range(Q):
        chosen = [
            features[m].double()
            for m in range(M)
            if ids[m] == query_ids[q] and cameras[m] == query_cameras[q]
        ]
        missing += not chosen
        expected.append(sum(chosen) / len(chosen) if chosen else query_features[q].double())
    arguments = [torch.from_numpy(x) for x in (ids, cameras, query_ids, query_cameras)]
    if missing and not own:
        with pytest.raises(InputError, match=f"{missing} of {Q} queries have no image"):
            multi_query_features(features, *arguments)
        return
    found = multi_query_features(features, *arguments, query_features if own else None)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.double(), torch.stack(expected), atol=1e-6)


def test_multi_query_does_not_depend_on_the_order_of_the_images():
    features, ids = torch.randn(200, 8), torch.arange(200) % 5
    cameras, order = torch.zeros(200, dtype=torch.int64), torch.randperm(200)
    queries = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    found = multi_query_features(features, ids, cameras, *queries)
    other = multi_query_features(features[order], ids[order], cameras, *queries)
    assert torch.allclose(found, other, rtol=0, atol=1e-7)


def test_ensemble_similarity_is_the_mean_of_the_peers():
    peers = [torch.randn(20, D).double() * scale for D, scale in ((4, 1), (7, 100), (2, 0.01))]
    whole = ensemble_features(peers)
    assert whole.shape == (20, 13)
    assert torch.allclose(whole.norm(dim=1), torch.ones(20).double())
    units = [normalize_features(f) for f in peers]
    assert torch.allclose(whole @ whole.T, sum(u @ u.T for u in units) / 3)
    one = normalize_features(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert torch.equal(one, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert normalize_features(torch.ones(1, 4).half()).dtype == torch.float32


IDS, CAMERAS = torch.tensor([1, 2]), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, None, IDS, IDS, CAMERAS, CAMERAS), {}, "or distances"),
        ((torch.ones(2, 3), None, IDS, IDS, CAMERAS, CAMERAS), {}, "or distances"),
        (
            (torch.ones(2, 3), torch.ones(2, 4), IDS, IDS, CAMERAS, CAMERAS),
            {},
            r"\(2, 3\) and \(2, 4\)",
        ),
        (
            (torch.ones(3, 2), torch.ones(2, 2), IDS, IDS, CAMERAS, CAMERAS),
            {},
            "3 x 2 images, but identities of 2 queries",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), IDS, IDS, CAMERAS, CAMERAS),
            {"metric": "manhattan"},
            "unknown metric 'manhattan': give one of cosine, euclidean",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), IDS, IDS, CAMERAS, CAMERAS[:1]),
            {},
            "2 gallery identities with 1 cameras",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), IDS.float(), IDS, CAMERAS, CAMERAS),
            {},
            "float32: give one integer an image",
        ),
        (
            (torch.ones(2, 2), torch.ones(0, 2), IDS, IDS[:0], CAMERAS, CAMERAS[:0]),
            {},
            "2 queries against 0 gallery images",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), IDS, IDS, CAMERAS, CAMERAS),
            {},
            "none of the 2 queries",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), IDS, IDS - 4, CAMERAS, CAMERAS),
            {},
            "identity -3: the least is -1",
        ),
        ((None, None, IDS, IDS, CAMERAS, CAMERAS), {"max_rank": 0}, "max_rank=0"),
        ((None, None, IDS, IDS, CAMERAS, CAMERAS), {"block": 0}, "block=0"),
        (
            (None, None, IDS, IDS, CAMERAS, CAMERAS),
            {"ties": "best"},
            "unknown ties 'best': give one of worst, given",
        ),
        (
            (None, None, IDS, IDS, CAMERAS, CAMERAS),
            {"distances": torch.ones(2, 2, dtype=torch.int64)},
            "int64: give",
        ),
        (
            (None, None, IDS, IDS, CAMERAS, CAMERAS),
            {"distances": torch.ones(2, 3)},
            "2 x 3 images, but",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        reid_scores(*arguments, **options)


def test_wrong_features_are_named():
    with pytest.raises(InputError, match="at least one peer"):
        ensemble_features([])
    with pytest.raises(InputError, match=r"features of \[2, 3\] images"):
        ensemble_features([torch.ones(2, 2), torch.ones(3, 2)])
    with pytest.raises(InputError, match="3 identities"):
        multi_query_features(torch.ones(2, 2), torch.ones(3).long(), CAMERAS, IDS, CAMERAS)


def test_scores_are_plain_numbers():
    scores = reid_scores(
        torch.randn(2, 4), torch.randn(2, 4), IDS, IDS, CAMERAS, CAMERAS.flip(0), max_rank=3
    )
    assert json.loads(json.dumps(asdict(scores)))["queries"] == 2
    assert all(type(value) is float for value in (scores.mAP, scores.mINP, *scores.cmc))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_same_scores_on_a_gpu(metric):
    labels = random_set(np.random.default_rng(5), 500, 5_000, 80, 6)
    q, g = torch.randn(500, 64), torch.randn(5_000, 64)
    d = feature_distances(q, g, metric)
    expected = reid_scores(None, None, *labels, distances=d)
    given_ = reid_scores(None, None, *labels, distances=d.cuda())
    assert given_.cmc == expected.cmc
    assert (given_.mAP, given_.mINP) == pytest.approx((expected.mAP, expected.mINP), abs=1e-12)
    on_gpu = [x.cuda() for x in labels]
    for found in (
        reid_scores(q.cuda(), g.cuda(), *labels, metric=metric),
        reid_scores(q.cuda(), g.cuda(), *on_gpu, metric=metric),
    ):
        assert found.mAP == pytest.approx(expected.mAP, abs=1e-4)  # another order of summation
        assert found.queries == expected.queries
    mean = multi_query_features(g.cuda(), labels[1], labels[3], labels[1][:9], labels[3][:9])
    assert torch.allclose(
        mean.cpu(), multi_query_features(g, labels[1], labels[3], labels[1][:9], labels[3][:9])
    )


def test_identities_whose_products_meet_in_64_bits():
    """Six times the other identity is 2 and a whole 2**64: its images before camera 0 and those of
    identity 0 before camera 2 are still of two people."""
    other, cameras = (2**64 + 2) // 6, 6
    gallery_ids = torch.tensor([0, other, *[other] * cameras])
    gallery_cameras = torch.tensor([3, 0, *range(cameras)])
    distances = torch.arange(len(gallery_ids)).float()[None]
    ids, camera = torch.tensor([0]), torch.tensor([2])
    scores = reid_scores(None, None, ids, gallery_ids, camera, gallery_cameras, distances=distances)
    assert (scores.queries, scores.mAP) == (1, 1.0)
