"""The float64 reference: against torch's own functions, numbers worked out by hand, the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fastdml_kernels import Options
from fastdml_kernels.reference import mutual_loss_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LITTLE, OPTIONS, make, pairwise, reference, settings_of, upstream_of

LN = math.log
# Two peers, two classes: p_1 = (3/4, 1/4), p_2 = (1/2, 1/2).
Z = torch.tensor([[[LN(3), 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])
KL_21 = 0.5 * LN(4 / 3)  # KL(p_2 || p_1), peer 1's
KL_12 = 0.75 * LN(3 / 2) + 0.25 * LN(1 / 2)


def losses(logits, labels, **given_options):
    options = {k: v for k, v in given_options.items() if hasattr(Options(), k)}
    weights = {k: v for k, v in given_options.items() if k not in options}
    return mutual_loss_reference(logits, labels, Options(**options), **weights)[0].tolist()


@pytest.mark.parametrize(
    ("label", "given_options", "expected"),
    [
        (FIRST, {}, [LN(4 / 3) + KL_21, LN(2) + KL_12]),
        (SECOND, {}, [LN(4) + KL_21, LN(2) + KL_12]),
        (FIRST, {"ce_weight": 0.0}, [KL_21, KL_12]),
        (FIRST, {"kl_weight": 0.0}, [LN(4 / 3), LN(2)]),
        (FIRST, {"ce_weight": 2.0, "kl_weight": 3.0},
         [2 * LN(4 / 3) + 3 * KL_21, 2 * LN(2) + 3 * KL_12]),
        (FIRST, {"ce_weight": 0.0, "divergence": "jeffreys"}, [(KL_12 + KL_21) / 2] * 2),
        # two peers: the only teacher is its own mixture
        (FIRST, {"ce_weight": 0.0, "target": "ensemble"}, [KL_21, KL_12]),
        (FIRST, {"ce_weight": 0.0, "target": "ensemble_logits"}, [KL_21, KL_12]),
        # both peers' largest logit is the first class; of equal ones the first counts
        (FIRST, {"ce_weight": 0.0, "gate": "correct"}, [KL_21, KL_12]),
        (SECOND, {"ce_weight": 0.0, "gate": "correct"}, [0.0, 0.0]),
        # on label 0 peer 1 is the best and teaches peer 2; on label 1 the reverse
        (FIRST, {"ce_weight": 0.0, "gate": "best"}, [0.0, KL_12]),
        (SECOND, {"ce_weight": 0.0, "gate": "best"}, [KL_21, 0.0]),
        (FIRST, {"ce_weight": 0.0, "peer_weights": torch.tensor([[9.0, 2.0], [0.0, 9.0]])},
         [2 * KL_21, 0.0]),
        (FIRST, {"kl_weight": 0.0, "label_smoothing": 0.5},
         [0.75 * LN(4 / 3) + 0.25 * LN(4), LN(2)]),
        (SECOND, {"kl_weight": 0.0, "reduction": "sum", "class_weight": torch.tensor([1.0, 5.0])},
         [5 * LN(4), 5 * LN(2)]),
        (torch.tensor([-100]), {"reduction": "sum"}, [0.0, 0.0]),
        (torch.tensor([-100]), {"mimic_ignored": True}, [KL_21, KL_12]),
        (torch.tensor([-100]), {}, [math.nan, math.nan]),
    ],
)  # fmt: skip
def test_losses_worked_out_by_hand(label, given_options, expected):
    assert losses(Z, label, **given_options) == pytest.approx(expected, abs=1e-15, nan_ok=True)


def test_temperature_by_hand():
    """z / 2 halves the log-odds: p_1 = (sqrt 3, 1) / (sqrt 3 + 1). Times T**2 = 4."""
    a = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = 4 * (0.5 * LN(0.5 / a) + 0.5 * LN(0.5 / (1 - a)))
    assert losses(Z, FIRST, temperature=2.0, ce_weight=0.0)[0] == pytest.approx(expected)


def test_gradient_and_statistics_by_hand():
    """dz_1 = (p_1 - y) + (p_1 - p_2) = (-1/4, 1/4) + (1/4, -1/4)."""
    z = [x.clone().requires_grad_() for x in Z]
    loss, stats = mutual_loss_reference(z, FIRST)
    loss.sum().backward()
    assert z[0].grad.tolist() == [pytest.approx([0, 0], abs=1e-15)]
    assert z[1].grad.tolist() == [pytest.approx([-0.75, 0.75])]
    assert stats["ce"].tolist() == pytest.approx([LN(4 / 3), LN(2)])
    assert stats["kl"].tolist() == pytest.approx([KL_21, KL_12])
    assert stats["pairwise_kl"][0].tolist() == pytest.approx([0, KL_12])  # teacher 1
    assert stats["pairwise_kl"][1].tolist() == pytest.approx([KL_21, 0])
    assert stats["entropy"].tolist() == pytest.approx([LN(4) - 0.75 * LN(3), LN(2)])
    assert stats["correct"].tolist() == [1, 1]
    assert stats["ensemble_correct"] == 1


def test_three_peers_and_their_mixtures_by_hand():
    """Peer 3's teachers are p_1 = (3/4, 1/4) and p_2 = (1/2, 1/2): their mean is (5/8, 3/8), the
    softmax of their mean logits (sqrt 3, 1) / (sqrt 3 + 1); p_3 = (1/2, 1/2)."""
    z = [*Z, Z[1]]
    a = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = {
        "peers": (KL_12 + 0) / 2,
        "ensemble": 5 / 8 * LN(5 / 4) + 3 / 8 * LN(3 / 4),
        "ensemble_logits": a * LN(2 * a) + (1 - a) * LN(2 * (1 - a)),
    }
    for target, value in expected.items():
        assert losses(z, FIRST, ce_weight=0.0, target=target)[2] == pytest.approx(value)


def test_the_papers_formulas():
    """Zhang et al. 2018, equations 1 to 6 and section 3.3, sum by sum; their sums over the samples
    are means here."""
    p = make(3, 4, 5, seed=1)
    K, N, C = p.shape
    probabilities = [
        [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in z.tolist()]
        for z in p.logits
    ]
    for k in range(K):
        cross_entropy = -sum(LN(probabilities[k][i][p.labels[i]]) for i in range(N)) / N
        mimicry = sum(
            probabilities[t][i][m] * LN(probabilities[t][i][m] / probabilities[k][i][m])
            for t in range(K) if t != k for i in range(N) for m in range(C)
        )  # fmt: skip
        expected = cross_entropy + mimicry / (K - 1) / N
        assert losses(p.logits, p.labels)[k] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("class_weight", [None, torch.arange(1.0, 8.0)])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_one_peer_is_cross_entropy(reduction, label_smoothing, class_weight, ignore_index):
    p = make(1, 20, 7)
    options = {"reduction": reduction, "label_smoothing": label_smoothing,
               "ignore_index": ignore_index}  # fmt: skip
    expected = F.cross_entropy(
        p.logits[0].double(), p.labels,
        weight=None if class_weight is None else class_weight.double(), **options,
    )  # fmt: skip
    ours = losses(p.logits, p.labels, class_weight=class_weight, **options)[0]
    torch.testing.assert_close(torch.tensor(ours).double(), expected, rtol=1e-6, atol=1e-7)


def test_two_peers_are_kl_div_batchmean():
    p = make(2, 20, 7)
    log_p = [torch.log_softmax(z.double(), 1) for z in p.logits]
    expected = F.kl_div(log_p[0], log_p[1], log_target=True, reduction="batchmean")
    assert losses(p.logits, p.labels, ce_weight=0.0)[0] == pytest.approx(expected.item())


@given(
    setting=settings_of(OPTIONS, 5),
    K=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_every_option_agrees_with_torch_in_float64(setting, K, ignored, seed):
    p = make(K, 9, 11, ignored=ignored, seed=seed, **setting)
    up = upstream_of(p, seed)
    ours, theirs = reference(p, up), pairwise(p, torch.float64, up)
    little = {"rtol": 1e-10, "atol": LITTLE * 1e-14, "equal_nan": True}
    torch.testing.assert_close(ours.losses, theirs.losses, **little)
    for own, other in zip(ours.grads, theirs.grads, strict=True):
        torch.testing.assert_close(own, other.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_one_peer_without_rows_has_no_kl_term():
    assert reference(make(1, 0, 5, mimic_ignored=True)).losses.tolist() == [0]


@pytest.mark.parametrize("gate", ["correct", "best"])
def test_a_row_without_a_teacher_sends_no_gradient_to_the_mixture(gate):
    p = make(3, 20, 10, target="ensemble", gate=gate, detach_targets=False)
    assert all(g.isfinite().all() for g in reference(p).grads)


def test_the_mean_of_probabilities_has_the_pairs_gradient_and_a_smaller_value():
    pairs, mixed = (reference(make(4, 30, 10, target=t)) for t in ("peers", "ensemble"))
    for a, b in zip(pairs.grads, mixed.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert (mixed.stats["kl"] < pairs.stats["kl"]).all()
