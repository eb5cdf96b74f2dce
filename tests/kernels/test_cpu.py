"""The CPU's two ways, native code and torch: every pair of options, every size, blocks of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastdml_kernels import cpu as cpu_module
from fastdml_kernels import cpu_rows
from fastdml_kernels.options import Options
from hypothesis import given, settings
from oracle import LAYOUTS, OPTIONS, Problem, check, cpu, make, problems, upstream_of


@pytest.mark.slow
@pytest.mark.parametrize("one", OPTIONS)
def test_every_pair_of_options(one):
    """Each pair alone; `test_pairs_of_options.py` has all of them in fewer problems."""
    for other in [name for name in OPTIONS if name >= one]:
        for values in itertools.product(OPTIONS[one], OPTIONS[other]):
            p = make(3, 12, 10, ignored=0.2, **dict(zip((one, other), values, strict=True)))
            check(p, upstream=upstream_of(p))


@given(problems(most_logits=40_000))
@settings(max_examples=120, deadline=None)
def test_any_shape_layout_dtype_and_three_options(drawn):
    p, upstream = drawn
    check(p, upstream=upstream)


@pytest.mark.slow
@given(problems(most_logits=300_000))
@settings(max_examples=500, deadline=None)
def test_any_shape_layout_dtype_and_three_options_at_length(drawn):
    p, upstream = drawn
    check(p, upstream=upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"temperature": 2.0}])
def test_float64_logits_stay_in_float64(layout, options):
    own = check(make(3, 20, 10, dtype=torch.float64, layout=layout, **options))
    assert own.losses.dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"target": "ensemble", "gate": "best"}, {"divergence": "jeffreys"},
     {"class_weight": True, "label_smoothing": 0.1}, {"temperature": 3.0},
     {"mimic_ignored": True}, {"target": "ensemble_logits", "reduction": "sum"}],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_blocks_of_rows_leave_no_seam(monkeypatch, rows, options):
    """Several blocks, the last one ragged, one of them not finite and worked through with care."""
    K, N, C = 3, 20, 10
    monkeypatch.setattr(cpu_rows, "library", lambda: None)
    monkeypatch.setattr(cpu_module, "BLOCK_BYTES", 4 * K * C * rows)
    p = make(K, N, C, ignored=0.2, **options)
    check(p)
    p.logits[1][13, 4] = -torch.inf
    p.labels[13] = 5
    check(p, yardsticks=False, grad=False)


NATIVE = pytest.mark.skipif(
    cpu_rows.library() is None, reason="cpu_rows.c was not compiled at installation"
)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 3.0}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignored": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("C", [1, 2, 7, 8, 9, 15, 16, 100, 1000])
def test_native_rows(C, options, dtype):
    for K, N in ((1, 5), (2, 33), (3, 40), (16, 70)):
        p = make(K, N, C, dtype=dtype, **options)
        check(p)


@NATIVE
def test_native_rows_are_those_of_torch(monkeypatch):
    """The same problem both ways: the native one must have been the native one."""
    p = make(3, 50, 100)
    native = cpu(p)
    called = []
    monkeypatch.setattr(cpu_rows, "library", lambda: called.append(1))
    plain = cpu(p)
    assert called
    for ours, theirs in zip(
        [native.losses, *native.grads], [plain.losses, *plain.grads], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@NATIVE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 7, 8, 95, 96, 99])
def test_a_logit_that_is_not_finite_goes_the_careful_way(at, bad):
    p = make(3, 40, 100)
    p.logits[1][37, at] = bad
    p.labels[37] = 50
    calls = [cpu_rows.rows_loss(p.logits, p.labels, p.options, 1.0, 1.0, 1.0, (), False)]
    assert calls == [None]
    if bad == -torch.inf:
        check(p, yardsticks=False, grad=False)


@NATIVE
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("C", [29, 37, 100, 751])
def test_classes_of_equal_logits_tie_wherever_they_are(C, grad):
    """As with a last layer of zeros; whole vectors and the row's end go different ways."""
    p = make(3, 8, C, spread=0.0)
    p.labels[:] = torch.tensor([0, C - 1, C // 2, 1, 0, 2, C - 2, 0])
    stats = cpu(p, grad=grad).stats
    assert stats["ensemble_correct"] == 3
    assert stats["correct"].tolist() == [3, 3, 3]


@NATIVE
def test_a_vocabulary_costs_native_rows_no_precision():
    """Where torch's own float32 normaliser is off by 1e-5."""
    check(make(2, 2, 262_144), yardsticks=False)


@NATIVE
@pytest.mark.parametrize("lowest", [-1e30, torch.finfo(torch.float32).min])
def test_classes_masked_by_the_lowest_number_count_for_nothing(lowest):
    """As a language model's padding: probability 0 times a huge logarithm, in every statistic."""
    p = make(3, 6, 20, seed=1)
    p.labels.clamp_(max=12)
    for z in p.logits:
        z[:, 13:] = lowest
    kept = [z[:, :13] for z in p.logits]
    own, alone = cpu(p), cpu(Problem(kept, p.labels, p.options))
    torch.testing.assert_close(own.losses, alone.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(own.stats, alone.stats, rtol=1e-5, atol=1e-6)
    assert all((g[:, 13:] == 0).all() for g in own.grads)


@NATIVE
def test_logits_farther_apart_than_float32_holds_go_the_careful_way():
    p = make(2, 4, 20)
    p.labels[:] = 3
    p.logits[0][1, 3], p.logits[0][1, 7] = 3e38, -3e38
    assert cpu_rows.rows_loss(p.logits, p.labels, p.options, 1.0, 1.0, 1.0, (), True) is None
    own = cpu(p)
    assert own.losses[1].isfinite()
    assert all(g.isfinite().all() for g in own.grads)


@NATIVE
def test_native_memory_is_only_what_was_asked_for():
    """Guard rows around gradients whose rows lie apart stay as they were."""
    for C in (3, 8, 13):
        p = make(2, 5, C)
        around = [torch.full((7, C + 5), 123.0) for _ in p.logits]
        grads = [a[1:6, 2 : 2 + C] for a in around]
        cpu_rows.rows_loss(p.logits, p.labels, p.options, 1.0, 1.0, 1.0, grads, True)
        for a, g in zip(around, grads, strict=True):
            assert (g != 123.0).all()
            g.fill_(123.0)
            assert (a == 123.0).all()


@pytest.mark.parametrize("native", [pytest.param(True, marks=NATIVE), False])
def test_wide_rows(monkeypatch, native):
    if not native:
        monkeypatch.setattr(cpu_rows, "library", lambda: None)
    check(make(2, 40, 32_000, dtype=torch.bfloat16))


def test_buffers_from_inference_mode_and_grad_mode_are_the_same():
    p = make(2, 8, 10)
    with torch.inference_mode():
        inside = cpu(p)
    assert torch.equal(inside.losses, cpu(p).losses)


def test_an_ignore_index_among_the_labels_that_no_row_has():
    p = make(2, 3, 10, ignore_index=4)
    p.labels[:] = torch.tensor([2, 3, 8])
    check(p)


@pytest.mark.parametrize("divergence", ["reverse", "jeffreys"])
def test_a_mixed_teacher_is_pulled_by_classes_below_the_smallest_number(divergence):
    """The gradient holds the share of one teacher in the mixture, where both are rounded to 0."""
    logits = [torch.zeros(1, 3) for _ in range(3)]
    logits[0][0, 0], logits[1][0, 1], logits[2][0, 2] = 200.0, 201.0, 199.0
    options = Options(target="ensemble", divergence=divergence, detach_targets=False)
    check(Problem(logits, torch.tensor([0]), options), yardsticks=False)


@pytest.mark.parametrize("beta", [1e-9, 1e-50, 1 - 1e-12])
@pytest.mark.parametrize("native", [pytest.param(True, marks=NATIVE), False])
def test_jensen_shannon_is_finite_however_small_a_share(monkeypatch, beta, native):
    """Also where 1 - beta is 1 in float32, and a class has no probability for one of two."""
    if not native:
        monkeypatch.setattr(cpu_rows, "library", lambda: None)
    p = make(2, 4, 10, divergence="jsd", jsd_beta=beta)
    p.logits[0].mul_(40.0)
    p.logits[1].mul_(-40.0)
    check(p, yardsticks=False)
