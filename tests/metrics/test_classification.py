"""Classification scores against a slow float64 reference written from the definitions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdml.errors import InputError
from fastdml.metrics import Classification, ClassificationScores


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def reference_of(p_rows, score_rows, labels) -> dict[str, float]:
    """One predictor's scores, row by row; `score_rows` ranks the classes, `p_rows` are (C,)."""
    right, right5, confidence, nll, entropy = [], [], [], [], []
    for p, score, label in zip(p_rows, score_rows, labels, strict=True):
        order = sorted(range(len(p)), key=lambda c: (-score[c], c))
        right.append(order[0] == label)
        right5.append(label in order[:5])
        confidence.append(max(p))
        nll.append(-math.log(p[label]))
        entropy.append(-sum(q * math.log(q) for q in p if q > 0))
    ece = 0.0
    for m in range(15):
        members = [
            i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15 or (m == c == 0)
        ]
        if members:
            accuracy = np.mean([right[i] for i in members])
            ece += (
                len(members)
                / len(labels)
                * abs(accuracy - np.mean([confidence[i] for i in members]))
            )
    return {
        "top1": np.mean(right),
        "top5": np.mean(right5),
        "ece": ece,
        "nll": np.mean(nll),
        "entropy": np.mean(entropy),
    }


def reference(logits: np.ndarray, labels: np.ndarray) -> tuple[list[dict], dict]:
    """Scores of each peer and of the ensemble; logits (K, N, C) float64."""
    p = np.array([[softmax(z) for z in peer] for peer in logits])
    peers = [reference_of(p[k], logits[k], labels) for k in range(len(logits))]
    return peers, reference_of(p.mean(axis=0), p.mean(axis=0), labels)


def near_a_step(logits: np.ndarray) -> bool:
    """Whether rounding to fp32 may move a row to another bin, or reorder the ensemble."""
    p = np.array([[softmax(z) for z in peer] for peer in logits])
    mean = p.mean(axis=0)
    confidence = np.concatenate([p.max(axis=2).ravel(), mean.max(axis=1)]) * 15
    edge = np.abs(confidence - np.round(confidence)) < 1e-4
    gaps = np.diff(np.sort(mean, axis=1), axis=1)
    return bool((edge & (confidence < 14.9)).any() or ((gaps > 0) & (gaps < 1e-6)).any())


def score(logits, labels, batches=(None,)) -> ClassificationScores:
    K, _, C = logits.shape
    metric = Classification(K, C)
    start = 0
    for size in batches:
        rows = slice(start, None if size is None else start + size)
        metric.update([torch.as_tensor(z[rows]) for z in logits], torch.as_tensor(labels[rows]))
        start += size or 0
    return metric.compute()


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(1, 4),
    N=st.integers(1, 24),
    C=st.integers(1, 12),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_scores_match_the_definitions(K, N, C, scale, seed, data):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((K, N, C))).astype(np.float32)
    labels = rng.integers(0, C, N)
    assume(not near_a_step(logits.astype(np.float64)))
    cut = data.draw(st.integers(0, N))  # two batches of any sizes, one of them perhaps empty
    scores = score(logits, labels, batches=(cut, None))
    peers, ensemble = reference(logits.astype(np.float64), labels)
    assert scores.rows == N
    assert scores.nonfinite == [0] * K
    for name in ("top1", "top5", "ece", "nll", "entropy"):
        assert getattr(scores, name) == pytest.approx([p[name] for p in peers], abs=1e-5), name
        assert getattr(scores, f"ensemble_{name}") == pytest.approx(ensemble[name], abs=1e-5), name


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 12),
    C=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_ties_go_to_the_lowest_class(N, C, seed, dtype):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-1, 2, (1, N, C))  # three values: most rows hold ties
    labels = rng.integers(0, C, N)
    metric = Classification(1, C)
    metric.update([torch.as_tensor(logits[0]).to(dtype)], torch.as_tensor(labels))
    scores = metric.compute()
    peers, _ = reference(logits.astype(np.float64), labels)
    assert scores.top1 == [peers[0]["top1"]] == [np.mean(logits[0].argmax(axis=1) == labels)]
    assert scores.top5 == [peers[0]["top5"]]
    assert scores.ensemble_top1 == peers[0]["top1"]


def test_batches_in_any_split_give_the_same_scores():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 100, 10)).astype(np.float32)
    labels = rng.integers(0, 10, 100)
    whole, split = score(logits, labels), score(logits, labels, batches=(64, 36))
    for name, value in asdict(whole).items():
        assert asdict(split)[name] == pytest.approx(value, rel=1e-6), name


def test_calibration_of_known_predictions():
    # Ten rows at confidence 0.7 of which 4 are right, ten at 0.95 of which 9 are right.
    z = torch.tensor([[math.log(0.7 / 0.3), 0.0]] * 10 + [[math.log(0.95 / 0.05), 0.0]] * 10)
    labels = torch.tensor([0] * 4 + [1] * 6 + [0] * 9 + [1])
    metric = Classification(1, 2)
    metric.update([z], labels)
    scores = metric.compute()
    assert scores.ece == pytest.approx([0.5 * 0.3 + 0.5 * 0.05])
    assert scores.top1 == [13 / 20]
    assert scores.top5 == [1.0]


def test_ensemble_is_the_mean_of_probabilities_not_of_logits():
    # Peer 0 is nearly sure of class 0; peers 1 and 2 lean to class 1.
    logits = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.9]]), torch.tensor([[0.0, 0.9]])]
    metric = Classification(3, 2)
    metric.update(logits, torch.tensor([0]))
    p0 = np.mean([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(0.9)), 1 / (1 + math.exp(0.9))])
    scores = metric.compute()
    assert scores.top1 == [1.0, 0.0, 0.0]
    assert scores.ensemble_top1 == float(p0 > 0.5)
    assert scores.ensemble_nll == pytest.approx(-math.log(p0), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_row_that_is_not_finite_is_wrong_and_visible(value, where):
    z = torch.tensor([[0.0, 5.0, 1.0], [4.0, 0.0, 0.0]])
    broken = z.clone()
    broken[0, where] = value
    metric = Classification(2, 3)
    metric.update([broken, z], torch.tensor([1, 0]))
    scores = metric.compute()
    assert scores.top1 == [0.5, 1.0]  # the finite row still counts, the other peer is untouched
    assert scores.top5 == [0.5, 1.0]
    assert scores.nonfinite == [1, 0]
    for name in ("nll", "entropy", "ece"):
        values = getattr(scores, name)
        assert math.isnan(values[0]), name
        assert math.isfinite(values[1]), name
        assert math.isnan(getattr(scores, f"ensemble_{name}")), name
    assert scores.ensemble_top1 == 0.5


def test_a_class_ruled_out_by_minus_infinity_is_fine():
    z = torch.tensor([[-math.inf, 1.0, 0.0], [2.0, -math.inf, -math.inf]])
    metric = Classification(1, 3)
    metric.update([z], torch.tensor([1, 0]))
    scores = metric.compute()
    assert scores.nonfinite == [0]
    assert scores.top1 == [1.0]
    assert scores.entropy[0] == pytest.approx(
        0.5 * -(0.731058 * math.log(0.731058) + 0.268941 * math.log(0.268941)), rel=1e-4
    )
    assert math.isfinite(scores.ece[0])


def test_a_row_of_minus_infinity_only_is_wrong():
    metric = Classification(1, 2)
    metric.update([torch.full((1, 2), -math.inf)], torch.tensor([0]))
    assert metric.compute().nonfinite == [1]
    assert metric.compute().top1 == [0.0]


def test_underflow_leaves_the_ensemble_loss_finite():
    z = torch.tensor([[0.0, 300.0]])
    metric = Classification(2, 2)
    metric.update([z, z], torch.tensor([0]))
    assert metric.compute().ensemble_nll == pytest.approx(300.0)


def test_labels_out_of_range_are_refused():
    metric = Classification(1, 3)
    metric.update([torch.zeros(4, 3)], torch.tensor([0, 3, -1, 2]))
    with pytest.raises(InputError, match=r"2 of 4 labels lie outside 0\.\.2"):
        metric.compute()


def test_int32_labels_and_strided_logits():
    z = torch.randn(4, 6).t()  # (6, 4), strides (1, 6)
    labels = torch.tensor([0, 9, 1, 9, 2, 9, 3, 9, 0, 9, 1, 9], dtype=torch.int32)[::2]
    ours, plain = Classification(1, 4), Classification(1, 4)
    ours.update([z], labels)
    plain.update([z.contiguous()], labels.long().contiguous())
    assert ours.compute() == plain.compute()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([torch.zeros(4, 3)], r"expected 2 of \(4, 3\)"),
        ([torch.zeros(4, 3), torch.zeros(4, 5)], r"\(4, 5\) for 4 labels"),
        ([torch.zeros(3, 3), torch.zeros(4, 3)], r"\(3, 3\), \(4, 3\)"),
    ],
)
def test_wrong_shapes_are_named(logits, message):
    with pytest.raises(InputError, match=message):
        Classification(2, 3).update(logits, torch.zeros(4, dtype=torch.int64))


def test_nothing_to_score():
    with pytest.raises(InputError, match="no rows"):
        Classification(1, 3).compute()
    with pytest.raises(InputError, match="K=0"):
        Classification(0, 3)


def test_scores_are_plain_numbers_and_carry_no_graph():
    z = torch.randn(8, 5, requires_grad=True)
    metric = Classification(1, 5)
    metric.update([z], torch.arange(8) % 5)
    assert not metric.sums[0].requires_grad
    assert json.loads(json.dumps(asdict(metric.compute())))["rows"] == 8


@pytest.mark.gpu
def test_no_host_synchronisation_and_the_same_scores_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(512, 100, generator=generator) for _ in range(4)]
    labels = torch.randint(0, 100, (512,), generator=generator)
    on_cpu, on_gpu = Classification(4, 100), Classification(4, 100, "cuda")
    on_cpu.update(logits, labels)
    moved = [z.cuda() for z in logits], labels.cuda()
    on_gpu.update(*moved)  # the first call may synchronise: it loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.update(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, scores = asdict(on_cpu.compute()), asdict(on_gpu.compute())
    assert scores.pop("rows") == 2 * expected.pop("rows")
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-5), name
