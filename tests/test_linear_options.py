"""`linear_mutual_loss` with every option, and with teachers that are given, against the reference
in float64; and against Liger's fused divergences and TRL's formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fastdml_kernels import Options, linear_loss
from fastdml_kernels.reference import mutual_loss_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml import linear_mutual_loss

DIVERGENCES = [
    {"divergence": "forward"}, {"divergence": "reverse"}, {"divergence": "jeffreys"},
    {"divergence": "jsd", "jsd_beta": 0.3}, {"divergence": "jsd", "jsd_beta": 0.0},
    {"symmetric": True},
]  # fmt: skip
OPTIONS = {
    "temperature": st.sampled_from([1.0, 2.5]),
    "kl_weight": st.sampled_from([1.0, 0.3]),
    "target": st.sampled_from(["peers", "ensemble", "ensemble_logits"]),
    "gate": st.sampled_from(["none", "correct", "best", "confidence", "entropy"]),
    "label_smoothing": st.sampled_from([0.0, 0.1]),
    "mimic_ignored": st.booleans(),
    "reduction": st.sampled_from(["mean", "sum"]),
}


def leaves(K, N, C, g):
    """Hidden states, weights and biases of K peers of different widths; the last has no bias."""

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    hidden, weight = [leaf(N, 3 + k) for k in range(K)], [leaf(C, 3 + k) for k in range(K)]
    return hidden, weight, [leaf(C) if k < K - 1 else None for k in range(K)]


def given_teachers(T, k, N, C, g):
    """`teacher_logits` and `teacher_topk`, and all their logits in full."""
    logits = torch.randn(T, N, C, generator=g, dtype=torch.float64)
    if k == 0:
        return (logits if T else None), None, list(logits)
    values, indices = torch.randn(N, C, generator=g).double().topk(k, dim=1)
    full = torch.full((N, C), -torch.inf, dtype=torch.float64).scatter(1, indices, values)
    return (logits if T else None), (values, indices), [*logits, full]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), options=st.fixed_dictionaries(OPTIONS),
       divergence=st.sampled_from(DIVERGENCES))  # fmt: skip
def test_equals_the_reference(data, options, divergence):
    draw = data.draw
    K, T, N, C = (draw(st.integers(*span)) for span in ((1, 3), (0, 2), (1, 9), (2, 12)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    hidden, weight, bias = leaves(K, N, C, g)
    infinite = divergence.get("divergence") in ("reverse", "jeffreys") or "symmetric" in divergence
    k = 0 if infinite else draw(st.integers(0, C))
    teacher_logits, topk, teachers = given_teachers(T, k, N, C, g)
    S = K + len(teachers)
    labels = torch.randint(0, C, (N,), generator=g)
    labels[1::3] = -100
    weights = {
        name: torch.rand(size, generator=g, dtype=torch.float64)
        for name, size in (
            ("class_weight", (C,)),
            ("sample_weight", (N,)),
            ("peer_weights", (S, S)),
        )
        if draw(st.booleans())
    }
    if "sample_weight" in weights:
        weights["sample_weight"][2::4] = 0.0
    students = draw(st.none() | st.sets(st.integers(0, K - 1), min_size=1))
    frozen = draw(st.sets(st.integers(0, K - 1), max_size=K - 1))
    for k in frozen:
        for t in (hidden[k], weight[k], bias[k]):
            t is None or t.requires_grad_(False)
    learn = [k for k in range(K) if k not in frozen and (students is None or k in students)]

    ours = linear_mutual_loss(
        hidden, weight, labels, bias, teacher_logits=teacher_logits, teacher_topk=topk,
        students=students and sorted(students), chunk_rows=draw(st.integers(1, 10)),
        **options, **divergence, **weights,
    )  # fmt: skip

    named = {**options, **divergence}
    if named.pop("symmetric", False):
        named["divergence"] = "jeffreys"
    numbers = {name: named.pop(name) for name in ("temperature", "kl_weight")}
    logits = [F.linear(h, w, b) for h, w, b in zip(hidden, weight, bias, strict=True)]
    expected, _ = mutual_loss_reference(
        [*logits, *teachers], labels, Options(**named), **numbers, **weights
    )
    expected = expected[:K]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert ours.requires_grad == bool(learn)
    if not learn:
        return
    upstream = torch.linspace(1.0, 2.0, K, dtype=torch.float64)
    ours.backward(upstream)
    wanted = [t for k in learn for t in (hidden[k], weight[k], bias[k]) if t is not None]
    found = [t.grad for t in wanted]
    others = {id(t) for t in (*hidden, *weight, *bias)} - {id(t) for t in wanted}
    assert all(
        t.grad is None for t in (*hidden, *weight, *bias) if id(t) in others and t is not None
    )
    exact = torch.autograd.grad((upstream * expected).nan_to_num()[learn].sum(), wanted)
    for one, two in zip(found, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_a_teacher_of_the_peers_has_no_buffer_and_no_work(monkeypatch):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = leaves(3, 8, 5, g)
    labels = torch.randint(0, 5, (8,), generator=g)
    wanted, computed = [], []
    compute, found = linear_loss.compute, linear_loss._compute

    def watched(z, call, grads):
        wanted.append([t is not None for t in grads])
        return compute(z, call, grads)

    monkeypatch.setattr(linear_loss, "compute", watched)
    monkeypatch.setattr(
        linear_loss, "_compute", lambda *a: computed.append(found(*a)) or computed[-1]
    )
    hidden[0].requires_grad_(False)
    weight[0].requires_grad_(False)
    bias[0].requires_grad_(False)
    linear_mutual_loss(hidden, weight, labels, bias, students=[0, 2], chunk_rows=3).sum().backward()
    assert wanted == [[False, False, True]] * 3
    assert [t is not None for t in computed[0].grads] == [False, False, True] * 2 + [False] * 3


def test_one_frozen_tensor_of_a_student_is_left_out():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = leaves(2, 8, 5, g)
    labels = torch.randint(0, 5, (8,), generator=g)
    weight[0].requires_grad_(False)  # say, an embedding that stays as it is
    hidden[1].requires_grad_(False)
    weight[1].requires_grad_(False)
    linear_mutual_loss(hidden, weight, labels, bias).sum().backward()
    assert hidden[0].grad is not None
    assert all(t.grad is None for t in (weight[0], hidden[1], weight[1]))


def generalised_jsd(student, teacher, beta, temperature):
    """The generalised Jensen-Shannon divergence of TRL's distillation trainers, a row each: with
    m = beta teacher + (1 - beta) student, beta KL(teacher || m) + (1 - beta) KL(student || m); beta
    0 is KL(teacher || student) and beta 1 KL(student || teacher). No factor T**2."""
    s, t = (torch.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    if beta == 0:
        return (t.exp() * (t - s)).sum(1)
    if beta == 1:
        return (s.exp() * (s - t)).sum(1)
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * (t.exp() * (t - m)).sum(1) + (1 - beta) * (s.exp() * (s - m)).sum(1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_generalised_jsd_of_trl(beta, temperature):
    g = torch.Generator().manual_seed(0)
    hidden, weight, _ = leaves(2, 9, 11, g)
    labels = torch.randint(0, 11, (9,), generator=g)
    labels[3] = -100
    student, teacher = (F.linear(h, w) for h, w in zip(hidden, weight, strict=True))
    kept = labels != -100
    expected = generalised_jsd(student, teacher.detach(), beta, temperature)[kept].mean()
    wanted = [hidden[0], weight[0]]
    exact = torch.autograd.grad(expected, wanted)
    ours = linear_mutual_loss(
        hidden, weight, labels, students=[0], divergence="jsd", jsd_beta=beta, chunk_rows=4,
        temperature=temperature, ce_weight=0.0, kl_weight=temperature**-2,
    )[0]  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
    for one, two in zip(torch.autograd.grad(ours, wanted), exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_ligers_fused_linear_jsd(beta, temperature):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        [t if t is None else t.detach().float().requires_grad_() for t in ts]
        for ts in leaves(3, 20, 50, g)
    )
    hidden, weight, bias = hidden[:2], weight[:2], bias[:2]
    labels = torch.randint(0, 50, (20,), generator=g)
    labels[::5] = -100
    theirs = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.7, weight_soft_loss=0.4, beta=beta, temperature=temperature,
        compiled=False, chunk_size=8,
    )(hidden[0], weight[0], hidden[1], weight[1], labels, bias[0], bias[1])  # fmt: skip
    wanted = [hidden[0], weight[0], bias[0]]
    expected = torch.autograd.grad(theirs, wanted)
    # Liger has no T**2
    ours = linear_mutual_loss(
        hidden, weight, labels, bias, students=[0], divergence="jsd", jsd_beta=beta, chunk_rows=6,
        temperature=temperature, ce_weight=0.7, kl_weight=0.4 / temperature**2,
    )[0]  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, two in zip(torch.autograd.grad(ours, wanted), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
