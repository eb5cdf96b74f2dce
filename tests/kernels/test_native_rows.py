"""The CPU's native code by itself: every option runs in it, at every width of vectors and every
number of classes around that width, and torch is not asked."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from fastdml_kernels import cpu as cpu_module
from fastdml_kernels import cpu_rows
from hypothesis import given, settings
from oracle import OPTIONS, Problem, check, cpu, make, problems

pytestmark = pytest.mark.skipif(
    cpu_rows.library() is None, reason="the native code was not compiled at installation"
)
WIDTHS = (4, 8, 16)  # lanes: any processor, AVX2, AVX-512; those that it lacks are the next lower
NATIVE = {name: values for name, values in OPTIONS.items() if name != "detach_targets"}
# One option of each kind, in settings that meet all of them.
SETTINGS = [
    {"temperature": 2.0, "students": "first"},
    {"divergence": "reverse", "gate": "entropy", "label_smoothing": 0.1, "mimic_ignored": True},
    {"divergence": "jeffreys", "target": "ensemble_logits", "temperature": 0.5},
    {"divergence": "jsd 0.2", "peer_weights": True, "sample_weight": True, "students": "others"},
    {"target": "ensemble", "gate": "confidence", "temperature": 4.0, "reduction": "none"},
    {"class_weight": True, "label_smoothing": 0.1, "gate": "correct", "divergence": "jsd"},
    {"gate": "best", "reduction": "sum", "kl_weight": 2.5, "class_weight": True},
]


@pytest.fixture
def widest():
    """Sets the largest number of lanes."""
    lanes = ctypes.c_int.in_dll(cpu_rows.library(), "fastdml_widest")
    before = lanes.value
    yield lambda width: setattr(lanes, "value", width)
    lanes.value = before


@pytest.fixture
def native_alone(monkeypatch):
    """Whatever reaches torch's way fails."""

    def refused(*_):
        raise AssertionError("the loss was computed in torch")

    monkeypatch.setattr(cpu_module._Problem, "block", refused)


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_of_classes_around_a_vector(width, widest, native_alone):
    widest(width)
    for C, options in zip(range(1, 41), itertools.cycle([{}, *SETTINGS])):
        K, N = 2 + C % 3, (1, 5, 33)[C % 3]
        dtype = (torch.float32, torch.bfloat16)[C // 8 % 2]
        p = make(K, N, C, dtype=dtype, layout=("contiguous", "padded")[C % 2], seed=C, **options)
        if N > 1:
            p.labels[N // 2] = -100
        check(p)


@pytest.mark.parametrize("one", NATIVE)
def test_no_option_needs_torch(one, native_alone):
    for value in NATIVE[one]:
        dtypes = [torch.float32, torch.bfloat16, torch.float32]
        check(make(3, 33, 20, dtype=dtypes, ignored=0.2, **{one: value}))


@given(problems(most_logits=20_000, options=NATIVE))
@settings(max_examples=60, deadline=None)
def test_any_shape_layout_dtype_and_three_options(drawn):
    check(drawn[0])


@pytest.mark.slow
@given(problems(most_logits=200_000, options=NATIVE))
@settings(max_examples=1000, deadline=None)
def test_any_shape_layout_dtype_and_three_options_at_length(drawn):
    check(drawn[0])


@pytest.mark.parametrize("options", SETTINGS)
def test_torch_gives_the_same_within_rounding(options, monkeypatch):
    p = make(3, 40, 50, ignored=0.2, **options)
    native = cpu(p)
    monkeypatch.setattr(cpu_rows, "library", lambda: None)
    plain = cpu(p)
    torch.testing.assert_close(native.losses, plain.losses, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(native.stats, plain.stats, rtol=5e-5, atol=1e-5)
    for ours, theirs in zip(native.grads, plain.grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("K", "N", "options"),
    [(4, 600, {}), *((3, 350, options) for options in ({}, *SETTINGS))],  # 4: a loop of its own
)
def test_sums_do_not_depend_on_the_number_of_threads(K, N, options, native_alone):
    p = make(K, N, 1000, **options)  # worth several threads
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(cpu(p))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert torch.equal(answers[0].losses, other.losses)
        assert all(torch.equal(answers[0].stats[name], v) for name, v in other.stats.items())
        for ours, theirs in zip(answers[0].grads, other.grads, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"students": "first"}])
def test_a_row_has_the_same_bits_alone_and_among_others(options, native_alone):
    """Short rows are normalised in groups, without those that have no label."""
    for K, C in ((2, 5), (3, 21), (2, 1000)):
        p = make(K, 21, C, reduction="sum", seed=C, **options)
        p.labels[::5] = -100
        p.labels[6:8] = -100
        together = cpu(p)
        for n in range(21):
            row = slice(n, n + 1)
            alone = Problem([z[row] for z in p.logits], p.labels[row], p.options, p.weights)
            for grad, one in zip(together.grads, cpu(alone).grads, strict=True):
                assert (grad is None and one is None) or torch.equal(grad[row], one)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", OPTIONS["target"] + ("peers",))
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jeffreys", "jsd"])
def test_equal_peers_diverge_by_exactly_0(divergence, target, width, widest, native_alone):
    widest(width)
    for T, C in itertools.product((1.0, 3.0), (5, 37)):
        p = make(3, 6, C, target=target, divergence=divergence, temperature=T, ce_weight=0.0)
        same = Problem([p.logits[0]] * 3, p.labels, p.options, p.weights)
        answer = cpu(same)
        assert (answer.losses == 0).all()
        assert (answer.stats["kl"] == 0).all()
        assert (answer.stats["pairwise_kl"] == 0).all()
        assert all((grad == 0).all() for grad in answer.grads)


@pytest.mark.parametrize("options", SETTINGS)
def test_memory_is_only_what_was_asked_for(options, native_alone):
    """Guards around gradients whose rows lie apart stay as they were."""
    for C in (3, 8, 13, 16, 21):
        p = make(3, 5, C, **options)
        around = [torch.full((7, C + 5), 123.0) for _ in p.logits]
        students = p.options.students or range(3)
        grads = [a[1:6, 2 : 2 + C] if k in students else None for k, a in enumerate(around)]
        cpu_module.mutual_loss_cpu(
            list(p.logits), p.labels, p.options, grads=grads, want_stats=True, **p.weights
        )
        for k, (a, g) in enumerate(zip(around, grads, strict=True)):
            if k in students:
                assert (g != 123.0).all()
                g.fill_(123.0)
            assert (a == 123.0).all()


def test_a_row_of_weight_0_may_hold_anything(native_alone):
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    for bad in (torch.nan, torch.inf, -torch.inf):
        p = make(2, 4, 20, gate="confidence")
        rows = [0, 2, 3]
        kept = Problem([z[rows] for z in p.logits], p.labels[rows], p.options,
                       {"sample_weight": weight[rows]})  # fmt: skip
        for z in p.logits:
            z[1, 3] = bad
        whole = cpu(Problem(p.logits, p.labels, p.options, {"sample_weight": weight}))
        alone = cpu(kept)
        assert torch.equal(whole.losses, alone.losses)
        for g, few in zip(whole.grads, alone.grads, strict=True):
            assert (g[1] == 0).all()
            assert torch.equal(g[rows], few)


@pytest.mark.parametrize("gate", ["confidence", "entropy"])
def test_a_soft_gate_between_teachers_that_give_the_label_no_probability(gate, native_alone):
    """Below the smallest float32, where their quotient is still to be right."""
    p = make(3, 4, 10, gate=gate)
    for k, z in enumerate(p.logits):
        z[:, 0] = 200.0 + k  # exp(-200) is 0 in float32
    p.labels[:] = 5
    assert check(p, yardsticks=False).losses.isfinite().all()


def test_weights_that_say_nothing_go_the_careful_way():
    """Negative or not finite: torch's answer, whatever that is."""
    p = make(2, 4, 10, peer_weights=True)
    for bad in (-1.0, torch.nan, torch.inf):
        weights = p.weights["peer_weights"].clone()
        weights[0, 1] = bad
        answer = cpu_rows.rows_loss(
            p.logits, p.labels, p.options, 1.0, 1.0, 1.0, (), True, peer_weights=weights
        )
        assert answer is None
