"""Who learns from whom, how much and by which divergence, on every path alike: students, softer
gates, weights of rows and divergences at their edges. Random values are held to the oracle in each
path's own file and in `test_pairs_of_options.py`."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import (
    DEVICE,
    IN_REGISTERS,
    PATHS,
    Answer,
    Problem,
    check,
    cpu,
    make,
    reference,
)

DIVERGENCES = ("forward", "reverse", "jeffreys", "jsd", "jsd 0.2")
GATES = ("none", "correct", "best", "confidence", "entropy")
TARGETS = ("peers", "ensemble", "ensemble_logits")


SLOW = ("register", "one_row", "wide")  # interpreted; by default their own files' tests run


@pytest.fixture(
    params=[
        pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, path in PATHS.items()
    ]
)
def path(request):
    """A path, for which options that rows in registers do not have are skipped."""
    arguments = request.node.callspec.params
    settings = arguments | (arguments.get("settings") or {})
    apart = settings.get("target") == "ensemble_logits" or settings.get("detach") is False
    if apart and request.param in IN_REGISTERS:
        pytest.skip("the wide kernel's option")
    return request.param


def equal(one: Answer, two: Answer) -> None:
    """The same bits."""
    assert torch.equal(one.losses, two.losses)
    for a, b in zip(one.grads, two.grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def weighted(p: Problem, times: torch.Tensor) -> Problem:
    return Problem(p.logits, p.labels, p.options, p.weights | {"sample_weight": times})


# ---- divergences


@pytest.mark.parametrize("target", TARGETS)
def test_equal_peers_diverge_by_exactly_nothing(path, target):
    """Under every divergence, and whoever is believed."""
    kinds = [*itertools.product(DIVERGENCES, GATES)]
    for K, (divergence, gate) in zip(itertools.cycle((2, 3, 5)), kinds, strict=False):
        if path is not cpu and GATES.index(gate) != DIVERGENCES.index(divergence):
            continue
        p = make(K, 2, 9, target=target, divergence=divergence, gate=gate, temperature=2.0)
        same = [p.logits[0]] * K
        weights = p.weights | {"ce_weight": 0.0}
        own = path(Problem(same, p.labels, p.options, weights))
        assert (own.losses == 0).all(), (divergence, gate)
        assert all((g == 0).all() for g in own.grads), (divergence, gate)
        assert (own.stats["kl"] == 0).all()


def test_a_beta_of_0_and_of_1_names_another_divergence(path):
    """Bit for bit: jsd_beta 0 is the forward divergence, 1 the reverse one."""
    for beta, limit in ((0.0, "forward"), (1.0, "reverse")):
        equal(path(make(3, 4, 10, divergence="jsd", jsd_beta=beta)),
              path(make(3, 4, 10, divergence=limit)))  # fmt: skip


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_supports_that_differ_are_a_finite_distance_apart(path, target, detach):
    """At most the entropy of beta; 0 log 0 is 0 in either direction."""
    for beta in (0.5, 0.2):
        p = make(2, 2, 4, divergence="jsd", jsd_beta=beta, target=target, detach_targets=detach)
        z = torch.full((2, 2, 4), -torch.inf)
        z[0, :, :2], z[1, :, 2:] = 0.0, 0.0
        labels = torch.tensor([0, 1])
        weights = {"ce_weight": 0.0}
        upstream = None if detach else torch.ones(2)
        extra = {} if detach else {"upstream": upstream.to("cpu" if path is cpu else DEVICE)}
        own = path(Problem(list(z), labels, p.options, weights), stats=False, **extra)
        most = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
        torch.testing.assert_close(own.losses.cpu(), torch.full((2,), most), rtol=1e-6, atol=0)
        assert all(g.isfinite().all() for g in own.grads)


@pytest.mark.parametrize("divergence", ["reverse", "jeffreys", "jsd"])
def test_classes_without_probability_contribute_nothing(path, divergence):
    p = make(3, 4, 9, divergence=divergence, seed=4)
    logits = [z.clone() for z in p.logits]
    for z in logits:
        z[1, [2, 7]] = -torch.inf
    p.labels[1] = 3
    own = path(Problem(logits, p.labels, p.options), stats=False)
    fewer = reference(Problem(
        [z[1:2, [0, 1, 3, 4, 5, 6, 8]] for z in logits], torch.tensor([2]), p.options,
        {"ce_weight": 0.25, "kl_weight": 0.25},
    ))  # fmt: skip
    for g, want in zip(own.grads, fewer.grads, strict=True):
        row = g[1].cpu().double()
        assert (row[[2, 7]] == 0).all()
        torch.testing.assert_close(row[[0, 1, 3, 4, 5, 6, 8]], want[0], rtol=1e-5, atol=1e-6)


# ---- soft gates


def two_teachers(gate: str, first: float, second: float, **settings) -> Problem:
    """A student and two teachers whose log-probabilities of the label are about these."""
    p = make(3, 1, 5, gate=gate, **settings)
    for z, value in zip(p.logits[1:], (first, second), strict=True):
        z.zero_()
        z[0, 0] = value
    return Problem(p.logits, torch.tensor([0]), p.options, p.weights)


@pytest.mark.parametrize("target", TARGETS)
def test_teachers_below_the_smallest_probability_are_still_compared(path, target):
    """Both give the label less than 1e-38, one e times as much as the other."""
    p = two_teachers("confidence", -120.0, -121.0, target=target)
    own = check(p, path, yardsticks=False, stats=False)
    assert own.losses.isfinite().all()
    assert all(g.isfinite().all() for g in own.grads)
    one = two_teachers("none", -120.0, -121.0, target=target, peer_weights=False)
    share = math.e / (1 + math.e)
    one.weights["peer_weights"] = torch.tensor(
        [[0, share, 1 - share], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    )
    expected = path(one, grad=False, stats=False).losses[0]
    torch.testing.assert_close(own.losses[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["confidence", "entropy"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_teacher_that_diverged_is_not_believed(path, gate, target):
    p = make(3, 3, 6, gate=gate, target=target, seed=1)
    logits = [z.clone() for z in p.logits]
    logits[2][1] = torch.nan
    own = path(Problem(logits, p.labels, p.options), stats=False)
    pair = make(3, 3, 6, gate=gate, target=target, reduction="none", seed=1)
    edges = torch.tensor([[0, 1.0, 0], [1.0, 0, 0], [0.5, 0.5, 0]])
    alone = reference(Problem(pair.logits, p.labels, pair.options, {"peer_weights": edges}))
    whole = reference(pair)
    for k in (0, 1):
        losses = whole.losses[k].clone()
        losses[1] = alone.losses[k, 1]  # all of its weight goes to the other
        torch.testing.assert_close(own.losses[k].cpu().double(), losses.mean(), rtol=1e-5, atol=0)
        assert own.grads[k].isfinite().all()
    assert own.losses[2].isnan()


@pytest.mark.parametrize("gate", ["confidence", "entropy"])
@pytest.mark.parametrize("target", TARGETS)
def test_nobody_is_left_to_be_believed(path, gate, target):
    p = make(3, 2, 6, gate=gate, target=target)
    logits = [z.clone() for z in p.logits]
    for z in logits[1:]:
        z[0] = torch.nan
    own = path(Problem(logits, p.labels, p.options, {"ce_weight": 0.0}), stats=False)
    assert own.losses[0].isfinite()
    assert (own.grads[0][0] == 0).all()
    assert (own.grads[0][1] != 0).any()


def test_a_label_of_probability_0_with_everyone_teaches_nothing(path):
    p = make(3, 2, 6, gate="confidence")
    logits = [z.clone() for z in p.logits]
    for z in logits[1:]:
        z[0, 2] = -torch.inf
    labels = torch.tensor([2, 1])
    own = path(Problem(logits, labels, p.options, {"ce_weight": 0.0}), stats=False)
    assert own.losses[0].isfinite()
    assert (own.grads[0][0] == 0).all()
    # the others believe the first, who alone knows of the class: their divergence is infinite
    assert own.losses[1:].isinf().all()


@pytest.mark.parametrize("gate", ["confidence", "entropy"])
def test_one_teacher_alone_keeps_its_weight_whatever_it_is_worth(path, gate):
    soft, hard = (path(make(2, 5, 7, gate=g, temperature=2.0)) for g in (gate, "none"))
    torch.testing.assert_close(soft.losses, hard.losses, rtol=1e-6, atol=0)
    for a, b in zip(soft.grads, hard.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_entropy_needs_no_label_and_confidence_does(path):
    for gate, taught in (("entropy", True), ("confidence", False)):
        p = make(3, 4, 6, gate=gate, mimic_ignored=True)
        q = Problem(p.logits, torch.full_like(p.labels, -100), p.options)
        own = check(q, path, yardsticks=False)
        assert bool((own.losses != 0).all()) == taught


# ---- weights of rows


@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "ensemble", "gate": "entropy", "mimic_ignored": True, "label_smoothing": 0.1},
     {"reduction": "sum", "divergence": "jsd", "class_weight": True, "temperature": 2.0}],
    ids=str,
)  # fmt: skip
def test_a_row_of_weight_w_counts_as_w_rows(path, settings):
    p = make(3, 5, 7, ignored=0.3, seed=3, **settings)
    times = torch.tensor([1, 3, 0, 2, 1])
    again = torch.arange(5).repeat_interleave(times)
    repeated = Problem([z[again] for z in p.logits], p.labels[again], p.options, p.weights)
    own, expected = path(weighted(p, times.float())), path(repeated)
    close = {"rtol": 3e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(own.losses, expected.losses, **close)
    for name, value in expected.stats.items():
        torch.testing.assert_close(own.stats[name], value, **close, msg=name)
    for g, rows in zip(own.grads, expected.grads, strict=True):
        summed = torch.zeros_like(g).index_add_(0, again.to(g.device), rows)
        torch.testing.assert_close(g, summed, **close)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_of_weight_0_is_absent_whatever_is_in_it(path, value, reduction):
    p = make(3, 4, 6, reduction=reduction, target="ensemble")
    times = torch.tensor([1.0, 0.0, 2.0, 0.5])
    logits = [z.clone() for z in p.logits]
    for z in logits[:2]:
        z[1] = value
    broken = weighted(Problem(logits, p.labels, p.options), times)
    own, fine = path(broken), path(weighted(p, times))
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(own.losses, fine.losses, **close)
    for name, stat in fine.stats.items():
        torch.testing.assert_close(own.stats[name], stat, **close, msg=name)
    for a, b in zip(own.grads, fine.grads, strict=True):
        assert (a[1] == 0).all()
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("settings", [{}, {"gate": "confidence", "divergence": "reverse"}], ids=str)
def test_equal_weights_are_none(path, settings):
    p = make(3, 6, 8, ignored=0.2, **settings)
    plain = path(p)
    for value in (1.0, 0.25):
        own = path(weighted(p, torch.full((6,), value)))
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(own.losses, plain.losses, **close)
        for a, b in zip(own.grads, plain.grads, strict=True):
            torch.testing.assert_close(a, b, **close)


def test_no_row_has_a_weight(path):
    """As no row at all: the mean of nothing is NaN, and nothing is sent back."""
    for settings in ({}, {"mimic_ignored": True}, {"reduction": "none"}, {"reduction": "sum"}):
        own = check(weighted(make(2, 3, 5, **settings), torch.zeros(3)), path, yardsticks=False)
        assert all((g == 0).all() for g in own.grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_rows_in_any_floating_dtype(path, dtype):
    p = make(2, 4, 6)
    times = torch.tensor([0.5, 2.0, 0.0, 1.5])
    if dtype == torch.float64 and DEVICE == "cuda" and path is not cpu:
        dtype = torch.float32
    own, expected = path(weighted(p, times.to(dtype))), path(weighted(p, times))
    torch.testing.assert_close(own.losses, expected.losses, rtol=1e-6, atol=0)


# ---- students


@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "ensemble", "divergence": "jsd"}, {"target": "ensemble_logits"},
     {"divergence": "reverse", "gate": "confidence", "sample_weight": True},
     {"label_smoothing": 0.1, "reduction": "none", "temperature": 2.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("students", [(0,), (1, 2), (0, 3)])
def test_students_get_the_gradient_they_get_among_students(path, students, settings):
    """Constant teachers: who else learns changes nothing. Teachers have no gradient tensor."""
    own = path(make(4, 3, 9, students=students, **settings))
    every = path(make(4, 3, 9, **settings))
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(own.losses, every.losses, **close)
    for name, stat in every.stats.items():
        torch.testing.assert_close(own.stats[name], stat, **close, msg=name)
    for k, (g, want) in enumerate(zip(own.grads, every.grads, strict=True)):
        assert (g is None) == (k not in students)
        if g is not None:
            torch.testing.assert_close(g, want, **close)
