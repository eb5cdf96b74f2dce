"""`linear_mutual_loss` is `mutual_loss` of linear layers, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from fastdml_kernels import Call, Options, linear_loss
from fastdml_kernels.loss_op import flatten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.functional import linear

from fastdml import linear_mutual_loss, mutual_loss


def problem(K, N, C, dtype=torch.float64, seed=0, biased=True):
    g = torch.Generator().manual_seed(seed)
    widths = [3 + k for k in range(K)]  # peers of different widths

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = [leaf(N, d) for d in widths]
    weight = [leaf(C, d) for d in widths]
    bias = [leaf(C) if biased else None for _ in widths]
    labels = torch.randint(0, C, (N,), generator=g)
    return hidden, weight, bias, labels


def both(hidden, weight, bias, labels, upstream, chunk_rows=None, **options):
    leaves = [t for t in (*hidden, *weight, *bias) if t is not None]
    fused = linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=chunk_rows, **options)
    fused_grads = torch.autograd.grad(fused, leaves, upstream)
    logits = [linear(h, w, b) for h, w, b in zip(hidden, weight, bias, strict=True)]
    plain = mutual_loss(logits, labels, **options)
    plain_grads = torch.autograd.grad(plain, leaves, upstream.to(plain.dtype))
    return (fused, *fused_grads), (plain, *plain_grads)


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 4), N=st.integers(1, 30), C=st.integers(1, 40), chunk=st.integers(1, 31),
    ignored=st.booleans(), weighted=st.booleans(), mimic=st.booleans(), biased=st.booleans(),
    options=st.fixed_dictionaries({
        "temperature": st.sampled_from([1.0, 2.5]),
        "target": st.sampled_from(["peers", "ensemble", "ensemble_logits"]),
        "gate": st.sampled_from(["none", "correct", "best"]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "reduction": st.sampled_from(["mean", "sum"]),
    }),
)  # fmt: skip
def test_equals_the_two_steps(K, N, C, chunk, ignored, weighted, mimic, biased, options):
    hidden, weight, bias, labels = problem(K, N, C, torch.float32, seed=N * C, biased=biased)
    if ignored:
        labels[1::2] = -100  # the first row keeps its label
    if weighted:
        options = options | {"class_weight": torch.linspace(0.5, 2.0, C)}
    upstream = torch.linspace(1.0, 2.0, K)
    fused, plain = both(
        hidden, weight, bias, labels, upstream, chunk, mimic_ignored=mimic, **options
    )
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_the_default_chunks_cover_every_row(monkeypatch):
    hidden, weight, bias, labels = problem(2, 37, 11, torch.float32)
    monkeypatch.setitem(linear_loss.CHUNK_BYTES, "cpu", 4 * 2 * 11 * 5)  # 5 rows at a time
    fused, plain = both(hidden, weight, bias, labels, torch.ones(2), None)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_logits_of_all_rows_never_exist(monkeypatch):
    seen = []
    compute = linear_loss.compute

    def watched(logits, *rest):
        seen.extend(z.shape[0] for z in logits)
        return compute(logits, *rest)

    monkeypatch.setattr(linear_loss, "compute", watched)
    hidden, weight, bias, labels = problem(2, 50, 7, torch.float32)
    linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=8).sum().backward()
    assert max(seen) == 8
    assert sum(seen) == 2 * 50


def test_half_precision_adds_up_in_float32():
    """bf16 sums over 64 chunks would lose most of the last chunks' gradient."""
    hidden, weight, bias, labels = problem(2, 256, 9, torch.bfloat16)
    linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=4, reduction="sum").sum().backward()
    exact = [[t.detach().double().requires_grad_() for t in ts] for ts in (hidden, weight, bias)]
    logits = [linear(h, w, b) for h, w, b in zip(*exact, strict=True)]
    mutual_loss(logits, labels, reduction="sum").sum().backward()
    for ours, theirs in zip((*weight, *bias), (*exact[1], *exact[2]), strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.02


def test_no_label_at_all():
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    labels.fill_(-100)
    losses = linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=2)
    losses.sum().backward()
    assert losses.isnan().all()  # as torch's cross_entropy
    assert all((h.grad == 0).all() for h in hidden)
    losses = linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=2, mimic_ignored=True)
    assert losses.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows(reduction):
    hidden, weight, bias, labels = problem(2, 0, 5, torch.float32)
    losses = linear_mutual_loss(hidden, weight, labels, bias, reduction=reduction)
    expected = mutual_loss(torch.zeros(2, 0, 5), labels, reduction=reduction)
    torch.testing.assert_close(losses.detach(), expected, equal_nan=True)
    losses.sum().backward()
    assert all((w.grad == 0).all() for w in weight)


def test_float64_stays_in_float64():
    hidden, weight, bias, labels = problem(2, 20, 7)
    options = {"class_weight": torch.rand(7), "chunk_rows": 6}
    fused, plain = both(hidden, weight, bias, labels, torch.ones(2).double(), **options)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_float16_keeps_gradients_below_its_smallest_number():
    """They are kept per row, not per batch, until a loss scale comes."""
    hidden, weight, bias, labels = problem(2, 512, 40, torch.float16)
    hidden = [(0.01 * h.detach()).requires_grad_() for h in hidden]
    weight = [(1e-3 * w.detach()).requires_grad_() for w in weight]
    losses = linear_mutual_loss(hidden, weight, labels, bias)
    grads = torch.autograd.grad(losses.sum() * 2.0**16, hidden)
    exact = [[t.detach().double().requires_grad_() for t in ts] for ts in (hidden, weight, bias)]
    expected = torch.autograd.grad(
        linear_mutual_loss(exact[0], exact[1], labels, exact[2]).sum() * 2.0**16, exact[0]
    )
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours.double() - theirs).norm() < 3e-3 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_layers_alone(dtype):
    hidden, weight, bias, labels = problem(2, 9, 7, dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = linear_mutual_loss(hidden, weight, labels, bias)
        results.append((losses, *torch.autograd.grad(losses.sum(), [*hidden, *weight, *bias])))
    assert all(map(torch.equal, *results))


def test_no_gradient_is_computed_without_need():
    hidden, weight, bias, labels = problem(2, 9, 7, torch.float32)
    wanted = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        compute = linear_loss.compute
        patch.setattr(linear_loss, "compute", lambda *a: wanted.append(a[2]) or compute(*a))
        assert not linear_mutual_loss(hidden, weight, labels, bias).requires_grad
    assert wanted == [[]]


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_whole_for_every_batch_size():
    torch._dynamo.reset()
    step = torch.compile(linear_mutual_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (9, 30):
        hidden, weight, bias, labels = problem(2, N, 7, torch.float32, seed=N)
        bias[0] = None
        weight[1].requires_grad_(False)
        leaves = [*hidden, weight[0], bias[1]]
        results = []
        for loss in (step, linear_mutual_loss):
            losses = loss(hidden, weight, labels, bias, chunk_rows=4, temperature=2.0)
            results.append((losses, *torch.autograd.grad((2 * losses).sum(), leaves)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_compiled_layers_may_share_hidden_and_weight():
    (hidden, _), (weight, _), _, labels = problem(2, 6, 5, torch.float32)
    loss = lambda h, w: linear_mutual_loss([h, h], [w, w], labels).sum()  # noqa: E731
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = (torch.autograd.grad(f(hidden, weight), [hidden, weight]) for f in (step, loss))
    torch.testing.assert_close(*grads)


def test_opcheck():
    hidden, weight, _, labels = problem(2, 6, 5, torch.float32)
    call = Call(labels, Options(), 1.0, 1.0, 1.0, None, None, None, False)
    arguments = ([h.detach() for h in hidden], [w.detach() for w in weight], [], [0, 0], [],
                 None, None, 4, [1] * 3 + [0] * 3, False, *flatten(call))  # fmt: skip
    torch.library.opcheck(torch.ops.fastdml.linear_mutual_loss.default, arguments)


def test_function_transforms_and_forward_mode_are_refused_by_name():
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    with pytest.raises(RuntimeError, match=r"linear_mutual_loss does not run under torch\.func"):
        torch.func.grad(lambda h: linear_mutual_loss([h, hidden[1]], weight, labels, bias).sum())(
            hidden[0]
        )
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(hidden[0].detach(), torch.ones_like(hidden[0]))
        with pytest.raises(RuntimeError, match="linear_mutual_loss has no forward-mode"):
            linear_mutual_loss([moving, hidden[1]], weight, labels, bias)


def test_changes_after_the_forward_move_no_gradient():
    """Every gradient is ready by then."""
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    temperature, class_weight = torch.tensor(2.0), torch.ones(5)
    options = {"temperature": temperature, "class_weight": class_weight, "chunk_rows": 4}
    leaves = [*hidden, *weight, *bias]
    expected = torch.autograd.grad(
        linear_mutual_loss(hidden, weight, labels, bias, **options).sum(), leaves
    )
    value = linear_mutual_loss(hidden, weight, labels, bias, **options).sum()
    with torch.no_grad():
        for t in (labels, temperature, class_weight, *leaves):
            t.zero_()
    assert all(map(torch.equal, torch.autograd.grad(value, leaves), expected))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_layers_from_inference_mode(frozen):
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    with torch.inference_mode():
        fixed = [t.detach().clone() for t in (hidden if frozen == "hidden" else weight)]
    given = (fixed, weight) if frozen == "hidden" else (hidden, fixed)
    grads = [
        torch.autograd.grad(linear_mutual_loss(*layers, labels, bias).sum(), bias)
        for layers in (given, (hidden, weight))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)])
def test_a_peer_that_has_diverged_is_nobodys_but_its_own_without_the_kl_term(zero):
    results = []
    for diverged in (False, True):
        hidden, weight, bias, labels = problem(3, 6, 5, torch.float32)
        if diverged:
            weight[1].data.fill_(torch.inf)
        losses = linear_mutual_loss(hidden, weight, labels, bias, kl_weight=zero, chunk_rows=4)
        losses.sum().backward()
        others = [t for part in (hidden, weight, bias) for t in (part[0], part[2])]
        results.append([losses.detach()[[0, 2]], *(t.grad for t in others)])
        assert losses[1].isnan() == diverged
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.2}, {}, {"ce_weight": 0.0}, {"ce_weight": torch.tensor(0.0)},
])  # fmt: skip
def test_class_weights_that_are_all_zero(options):
    """The mean is 0 / 0; without it, and in the gradients, the KL term goes on."""
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    labels.fill_(3)
    options["class_weight"] = torch.tensor([1.0, 1, 1, 0, 1])
    fused, plain = both(hidden, weight, bias, labels, torch.ones(2), 4, **options)
    assert fused[0].isnan().all() == ("ce_weight" not in options)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_frozen_layers_get_no_gradient():
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    weight[0].requires_grad_(False)
    linear_mutual_loss(hidden, weight, labels, bias).sum().backward()
    assert weight[0].grad is None
    assert weight[1].grad is not None


def test_second_backward_and_second_derivative_are_refused():
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    losses = linear_mutual_loss(hidden, weight, labels, bias)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        losses.sum().backward()
    losses = linear_mutual_loss(hidden, weight, labels, bias)
    with pytest.raises(RuntimeError, match="linear_mutual_loss has no second derivative"):
        torch.autograd.grad(losses.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, b: (h, w[:1], b), ValueError, "2 hidden, 1 weight and 2 bias"),
        (lambda h, w, b: (h, [w[0], w[1][:, :2]], b), ValueError, "peer 1: hidden"),
        (lambda h, w, b: ([], w, b), ValueError, r"hidden \[\]: give K tensors"),
        (lambda h, w, b: (h[0], w, b), ValueError, r"hidden \(6, 3\): give K tensors"),
        (lambda h, w, b: (h, [1, w[1]], b), ValueError, r"weight \['int', \(5, 4\)\]"),
        (
            lambda h, w, b: ([h[0].bfloat16(), h[1]], w, b),
            TypeError,
            "peer 0: .* torch.bfloat16, torch.float32, torch.float32: cast",
        ),
        (
            lambda h, w, b: (h, w, [b[0], b[1].double()]),
            TypeError,
            "peer 1: .* torch.float64: cast",
        ),
        (
            lambda h, w, b: (h, [w[0], w[1].to("meta")], b),
            ValueError,
            "peer 1: .* on cpu, meta, cpu",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    hidden, weight, bias = change(hidden, weight, bias)
    with pytest.raises(error, match=message):
        linear_mutual_loss(hidden, weight, labels, bias)


def test_options_that_cannot_be_fused_are_named():
    hidden, weight, bias, labels = problem(2, 6, 5, torch.float32)
    with pytest.raises(ValueError, match="reduction='none'"):
        linear_mutual_loss(hidden, weight, labels, bias, reduction="none")
    with pytest.raises(ValueError, match="chunk_rows=0"):
        linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=0)
    with pytest.raises(ValueError, match=r"chunk_rows=2\.5: give a whole number"):
        linear_mutual_loss(hidden, weight, labels, bias, chunk_rows=2.5)
    with pytest.raises(TypeError, match=r"detach_targets: .* constant teachers"):
        linear_mutual_loss(hidden, weight, labels, bias, detach_targets=False)
