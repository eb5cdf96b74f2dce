"""From logits to gradients through autograd, torch.compile and CUDA graphs.

Eager calls go straight to the kernel (on the CPU to the closed form), compiled code sees the
operator; both must hand out the same losses and gradients for any gradient of the losses.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compiled import run_code
from fastdml_kernels import Call, Options, loss_op, losses_and_grads, mutual_loss
from fastdml_kernels.launch import launch
from fastdml_kernels.loss_op import flatten
from fastdml_kernels.scale_grads import launch_scale, scale_
from oracle import DEVICE, DTYPES, OPTION_NAMES, make
from torch import Tensor
from torch.autograd import forward_ad

from fastdml.engine.graph import without_collector

OPTIONS = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "temperature": 3.0, "class_weight": True},
    {"detach_targets": False},
    {"detach_targets": False, "reduction": "none", "target": "ensemble"},
    {"divergence": "jsd", "gate": "confidence", "sample_weight": True},
    {"detach_targets": False, "divergence": "reverse", "gate": "entropy", "sample_weight": True},
]


def leaves(K=3, N=6, C=10, *, stacked=False, dtype=torch.float32, seed=0) -> list[Tensor]:
    z = [x.to(DEVICE) for x in make(K, N, C, dtype=dtype, seed=seed).logits]
    return [torch.stack(z).requires_grad_()] if stacked else [x.requires_grad_() for x in z]


def labels_for(logits: list[Tensor], seed: int = 0) -> Tensor:
    _, N, C = make_shape(logits)
    return torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_shape(logits: list[Tensor]) -> tuple[int, ...]:
    return logits[0].shape if logits[0].dim() == 3 else (len(logits), *logits[0].shape)


def call(labels: Tensor, *, want_stats=True, **settings) -> Call:
    options = Options(**{k: v for k, v in settings.items() if k in OPTION_NAMES})
    weight = torch.linspace(0.5, 1.5, 10, device=DEVICE) if settings.get("class_weight") else None
    numbers = (settings.get(n, 1.0) for n in ("temperature", "ce_weight", "kl_weight"))
    times = None
    if settings.get("sample_weight"):
        times = torch.arange(len(labels), device=DEVICE) * 0.25  # the first row is absent
    return Call(labels, options, *numbers, None, weight, times, want_stats)


def loss(logits: list[Tensor], **settings) -> Tensor:
    return mutual_loss(logits, call(labels_for(logits), **settings))[0]


def gradient_of_each(logits: list[Tensor], upstream: Tensor, **settings) -> tuple[Tensor, ...]:
    """The gradient as a sum of one-hot ones, each through a fresh graph."""
    total = [torch.zeros_like(z) for z in logits]
    for at in range(upstream.numel()):
        one = torch.zeros_like(upstream).flatten()
        one[at] = upstream.flatten()[at]
        grads = torch.autograd.grad(loss(logits, **settings), logits, one.view_as(upstream))
        total = [t + g for t, g in zip(total, grads, strict=True)]
    return tuple(total)


def same(one, two) -> None:
    torch.testing.assert_close(tuple(one), tuple(two), rtol=1e-5, atol=1e-7)


# ---- the losses' own gradient, in every form


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("settings", OPTIONS)
def test_any_gradient_of_the_losses(settings, stacked):
    z = leaves(stacked=stacked)
    shape = loss(z, **settings).shape
    values = torch.linspace(-2, 3, torch.Size(shape).numel(), device=DEVICE).view(shape)
    wide = torch.full((*shape, 3), torch.nan, device=DEVICE)
    wide[..., 1] = values
    for upstream in (values, wide[..., 1], values.t().contiguous().t()):
        same(torch.autograd.grad(loss(z, **settings), z, upstream),
             gradient_of_each(z, values, **settings))  # fmt: skip


@pytest.mark.parametrize("settings", OPTIONS)
@pytest.mark.parametrize("value", [1.0, 0.0, -2.5])
def test_a_gradient_of_stride_0(settings, value):
    """As from `sum`; 1 leaves the stored gradients as they are."""
    z = leaves()
    values = torch.full((), value, device=DEVICE).expand(loss(z, **settings).shape)
    grads = torch.autograd.grad(loss(z, **settings), z, values)
    ones = torch.autograd.grad(loss(z, **settings).sum(), z)
    same(grads, [value * g for g in ones])


def test_a_gradient_that_comes_through_cat():
    """cat's backward hands out slices of one strided tensor."""
    z, other = leaves(), torch.ones(3, 6, device=DEVICE, requires_grad=True)
    weights = torch.arange(36.0, device=DEVICE).view(6, 6)
    both = torch.cat([loss(z, reduction="none"), other]).t() @ weights
    grads = torch.autograd.grad(both.sum(), z)
    same(grads, gradient_of_each(z, weights.sum(1)[:3, None].expand(3, 6), reduction="none"))


def test_losses_apart_are_the_losses_together():
    z = leaves()
    apart = [torch.autograd.grad(loss(z)[k], z[k])[0] for k in range(3)]
    same(apart, torch.autograd.grad(loss(z).sum(), z))


def test_the_kth_loss_touches_the_kth_logits_only():
    z = leaves()
    grads = torch.autograd.grad(loss(z)[1], z)
    assert (grads[0] == 0).all()
    assert (grads[2] == 0).all()
    assert (grads[1] != 0).any()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("compile_it", [False, True])
def test_a_loss_scale_comes_before_the_rounding_to_float16(compile_it, stacked):
    """Half of these gradients lie below 3e-8, where float16 has nothing: that is what a GradScaler
    is for."""
    z, scale = leaves(K=2, N=64, C=500, dtype=torch.float16, stacked=stacked), 2.0**16
    z = [(4 * x.detach()).requires_grad_() for x in z]
    y = labels_for(z)
    exact = [x.detach().float().requires_grad_() for x in z]
    expected = torch.autograd.grad(mutual_loss(exact, call(y))[0].sum(), exact)
    run = compiled("aot_eager") if compile_it else lambda z, y, s: mutual_loss(z, call(y))[0] * s
    grads = torch.autograd.grad(run(z, y, torch.tensor(scale, device=DEVICE)).sum(), z)
    for g, want in zip(grads, expected, strict=True):
        assert g.dtype == torch.float16
        torch.testing.assert_close(g.float() / scale, want, rtol=1e-3, atol=1e-11)


# ---- graphs


@pytest.mark.parametrize("settings", OPTIONS)
def test_a_second_backward_through_a_retained_graph(settings):
    z = leaves()
    value = loss(z, **settings)
    upstream = torch.linspace(1, 2, value.numel(), device=DEVICE).view(value.shape)
    first = torch.autograd.grad(value, z, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # what is handed out belongs to the caller
    same(torch.autograd.grad(value, z, upstream, retain_graph=True), kept)
    same(torch.autograd.grad(value, z, 2 * upstream), [2 * g for g in kept])
    with pytest.raises(RuntimeError, match=r"second time|saved"):
        torch.autograd.grad(value, z, upstream)


def test_logits_changed_before_a_second_backward_are_noticed():
    z = leaves()
    h = [x * 1 for x in z]
    value = loss(h).sum()
    value.backward(retain_graph=True)
    with torch.no_grad():
        h[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


CHANGEABLE = ("logits", "labels", "temperature", "ce_weight", "kl_weight", "peer_weights",
              "class_weight", "sample_weight")  # fmt: skip


def changeable(dtype=torch.float32, **options) -> tuple[list[Tensor], list[Tensor], dict, Call]:
    """Leaves, logits, and everything that a loop may write the next batch or a schedule into."""
    z = leaves(dtype=dtype)
    logits = [x * 1 for x in z]
    parts = {
        "logits": logits[1], "labels": labels_for(z), "peer_weights": torch.ones(3, 3),
        "class_weight": torch.linspace(0.5, 1.5, 10), "sample_weight": torch.linspace(0.5, 2.0, 6),
        **{name: torch.tensor(2.0) for name in ("temperature", "ce_weight", "kl_weight")},
    }  # fmt: skip
    parts = {name: t.to(DEVICE) for name, t in parts.items()}
    scalars = (parts[name] for name in ("temperature", "ce_weight", "kl_weight"))
    weights = (parts[name] for name in ("peer_weights", "class_weight", "sample_weight"))
    return z, logits, parts, Call(parts["labels"], Options(**options), *scalars, *weights, False)


def changed(parts: dict[str, Tensor], name: str) -> None:
    with torch.no_grad():
        parts[name].fill_(1)


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("name", CHANGEABLE)
@pytest.mark.parametrize("settings", [
    {"dtype": torch.float16}, {"detach_targets": False}, {"detach_targets": False,
    "reduction": "none", "divergence": "jeffreys"},
])  # fmt: skip
def test_what_changed_before_a_backward_that_reads_it_is_noticed(settings, name, compile_it):
    _, logits, parts, arguments = changeable(**settings)
    run = lambda logits, arguments: mutual_loss(logits, arguments)[0]  # noqa: E731
    if compile_it:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    value = run(logits, arguments).sum()
    changed(parts, name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_gradient_from_the_forward_outlives_changes_and_a_second_one_notices_them(name):
    z, logits, parts, arguments = changeable()
    expected = torch.autograd.grad(mutual_loss(logits, arguments)[0].sum(), z, retain_graph=True)
    value = mutual_loss(logits, arguments)[0].sum()
    changed(parts, name)
    same(torch.autograd.grad(value, z, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", OPTIONS)
def test_a_teacher_labels_and_weights_from_inference_mode(settings, dtype):
    """As of a frozen network, and of a loader or a schedule that runs under it."""
    z = leaves(dtype=dtype)
    numbers = {"temperature": torch.tensor(2.0, device=DEVICE), "class_weight": True}
    plain = call(labels_for(z), **{**settings, **numbers})
    with torch.inference_mode():
        teachers = [x.detach().clone() for x in z[1:]]
        given = Call(*(v.clone() if isinstance(v, Tensor) else v for v in plain))
    losses = mutual_loss([z[0], *teachers], given)[0]
    expected = mutual_loss([z[0], *(t.clone() for t in teachers)], plain)[0]
    same([losses], [expected])
    for retain_graph in (True, False):  # a second backward computes
        same(*(
            torch.autograd.grad(value.sum(), z[0], retain_graph=retain_graph)
            for value in (losses, expected)
        ))  # fmt: skip


def test_what_inference_mode_changes_later_is_kept_as_it_was():
    z = leaves(dtype=torch.float16)
    expected = torch.autograd.grad(loss(z).sum(), z[0])
    with torch.inference_mode():
        teachers = [x.detach().clone() for x in z[1:]]
    value = mutual_loss([z[0], *teachers], call(labels_for(z)))[0].sum()
    with torch.inference_mode():
        for teacher in teachers:
            teacher.zero_()
    same(torch.autograd.grad(value, z[0]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_code_takes_a_teacher_from_inference_mode_or_torch_names_the_remedy(dtype):
    z = leaves(dtype=dtype)
    with torch.inference_mode():
        teachers = [x.detach().clone() for x in z[1:]]
    step, scale = compiled("aot_eager"), torch.ones((), device=DEVICE)
    if dtype == torch.float16:  # its backward reads the logits
        with pytest.raises(RuntimeError, match="make a clone to get a normal tensor"):
            step([z[0], *teachers], labels_for(z), scale)
        return
    value = step([z[0], *teachers], labels_for(z), scale)
    same(torch.autograd.grad(value.sum(), z[0]), torch.autograd.grad(loss(z).sum(), z[0]))


def test_nothing_is_written_over_the_logits():
    """exp saves its output, the logits, for its own backward."""
    z = leaves()
    h = [x.exp() for x in z]
    before = [x.detach().clone() for x in h]
    same(
        torch.autograd.grad(loss(h).sum(), z),
        [g * x for g, x in zip(torch.autograd.grad(loss(h).sum(), h), before, strict=True)],
    )
    assert all(torch.equal(a, b) for a, b in zip(h, before, strict=True))


def test_gradients_accumulate():
    z = leaves()
    loss(z).sum().backward()
    first = [x.grad.clone() for x in z]
    loss(z).sum().backward()
    same([x.grad for x in z], [2 * g for g in first])
    assert len({x.grad.data_ptr() for x in z}) == 3


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_changed_in_place_downstream(stacked):
    """clip_grad_norm_ and hooks write into what backward handed over."""
    z = leaves(stacked=stacked)
    expected = [0.5 * g for g in torch.autograd.grad(loss(z).sum(), z)]
    for x in z:
        x.register_hook(lambda g: g.mul_(0.5))
    loss(z).sum().backward()
    same([x.grad for x in z], expected)


def test_one_tensor_as_two_peers():
    z = leaves(K=1)[0]
    grad = torch.autograd.grad(loss([z, z]).sum(), z)[0]
    twin = z.detach().clone().requires_grad_()
    same([grad], [sum(torch.autograd.grad(loss([z, twin]).sum(), [z, twin]))])


@pytest.mark.parametrize("learner", [0, 2])
def test_peers_that_need_no_gradient(learner):
    z = leaves()
    expected = torch.autograd.grad(loss(z).sum(), z)[learner]
    fixed = [x.detach().requires_grad_(k == learner) for k, x in enumerate(z)]
    loss(fixed).sum().backward()
    assert [x.grad is not None for x in fixed] == [k == learner for k in range(3)]
    same([fixed[learner].grad], [expected])


def test_no_graph_without_need():
    z = leaves()
    with torch.no_grad():
        assert loss(z).grad_fn is None
    with torch.inference_mode():
        same([loss(z)], [loss(z)])
    assert loss([x.detach() for x in z]).grad_fn is None


def test_statistics_carry_no_gradient():
    value, packed = mutual_loss(leaves(), call(labels_for(leaves())))
    assert value.requires_grad
    assert not packed.requires_grad


@pytest.mark.parametrize("settings", OPTIONS)
def test_second_derivatives_are_refused(settings):
    z = leaves()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(z, **settings).sum(), z, create_graph=True)


def test_function_transforms_are_refused_by_name():
    z = leaves()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda a: loss([a, z[1]]).sum())(z[0])
    arguments = call(labels_for(z))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda a: mutual_loss([a, a], arguments)[0])(torch.stack([z[0], z[1]]))


def test_derivatives_that_bypass_the_graph_are_refused_by_name():
    z = leaves()
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(loss(z), z, torch.eye(3, device=DEVICE), is_grads_batched=True)
    with forward_ad.dual_level():
        fixed = [x.detach() for x in z]
        moving = forward_ad.make_dual(fixed[0], torch.ones_like(z[0]))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss([moving, *fixed[1:]])
        same([loss(fixed)], [loss(z)])


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels compute in float32")
@pytest.mark.parametrize("settings", [
    {"detach_targets": False},
    {"detach_targets": False, "divergence": "jeffreys", "temperature": 2.0, "reduction": "none"},
    {"detach_targets": False, "target": "ensemble", "divergence": "jeffreys"},
    {"detach_targets": False, "target": "ensemble_logits", "divergence": "jeffreys"},
    {"detach_targets": False, "divergence": "reverse", "gate": "none", "sample_weight": True},
    {"detach_targets": False, "divergence": "jsd", "jsd_beta": 0.3, "target": "ensemble"},
    {"detach_targets": False, "divergence": "jsd", "target": "ensemble_logits"},
])  # fmt: skip
def test_gradcheck(settings):
    """Possible where the teachers are not constants."""
    z = [x.detach().double().requires_grad_() for x in leaves(N=3, C=5)]
    y = torch.tensor([0, 3, -100])
    assert torch.autograd.gradcheck(lambda *z: mutual_loss(z, call(y, **settings))[0], z)


# ---- the backward kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["ones", "rows", "peers", "expanded", "transposed", "zeros"])
def test_scale_rows(dtype, form):
    K, N, C = 3, 7, 1030
    grads = list(torch.randn(K, N, C).to(dtype).to(DEVICE).unbind())
    upstream = {
        "ones": torch.ones(K, N), "rows": torch.randn(K, N), "peers": torch.randn(K),
        "expanded": torch.tensor(2.5).expand(K), "transposed": torch.randn(N, K).t(),
        "zeros": torch.zeros(K),
    }[form].to(DEVICE)  # fmt: skip
    by_row = upstream if upstream.dim() == 2 else upstream[:, None].expand(K, N)
    expected = [g.float() * u[:, None] for g, u in zip(grads, by_row, strict=True)]
    by_torch = [g.cpu().clone() for g in grads]
    launch_scale(grads, upstream)
    scale_(by_torch, upstream.cpu())
    eps = torch.finfo(dtype).eps
    for g, other, want in zip(grads, by_torch, expected, strict=True):
        torch.testing.assert_close(g.float(), want, rtol=eps, atol=1e-7)
        # rounded to nearest, once
        torch.testing.assert_close(other.float(), want.cpu(), rtol=0.51 * eps, atol=1e-7)


@pytest.mark.parametrize("regime", ["register", "wide"])
def test_kernels_read_weights_of_any_strides(monkeypatch, regime):
    p = make(3, 5, 10, peer_weights=True, class_weight=True).on(DEVICE)
    weights = p.weights["peer_weights"], p.weights["class_weight"]
    strided = weights[0].t().contiguous().t(), weights[1].repeat_interleave(2)[::2]
    monkeypatch.setattr(loss_op, "mutual_loss_cpu", partial(launch, regime=regime))
    monkeypatch.setattr(loss_op, "launch", partial(launch, regime=regime))
    plain, other = (
        losses_and_grads(
            p.logits, Call(p.labels, p.options, 1.0, 1.0, 1.0, *w, None, True), range(3)
        )
        for w in (weights, strided)
    )
    same([*other[:2], *other[2]], [*plain[:2], *plain[2]])


def test_scale_of_no_rows():
    for scale in (scale_, launch_scale):
        scale([torch.empty(0, 5, device=DEVICE)] * 2, torch.ones(2, device=DEVICE))


# ---- the operator and torch.compile


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("settings", OPTIONS)
def test_opcheck(settings, need_grad, stacked):
    z = [x.detach() for x in leaves(stacked=stacked)]
    upstream = None
    if need_grad and settings.get("detach_targets") is False:
        upstream = torch.ones(loss(z, **settings).shape, device=DEVICE)
    students = list(range(make_shape(z)[0])) if need_grad else []
    arguments = (z, upstream, students, need_grad, *flatten(call(labels_for(z), **settings)))
    results = torch.library.opcheck(torch.ops.fastdml.mutual_loss.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_every_dtype():
    for dtype in DTYPES:
        z = [x.detach() for x in leaves(dtype=dtype)]
        arguments = (z, None, [0, 1, 2], True, *flatten(call(labels_for(z))))
        torch.library.opcheck(torch.ops.fastdml.mutual_loss.default, arguments)


def compiled(backend: str, dynamic: bool | None = None, **settings):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend, dynamic=dynamic)
    def step(logits, labels, scale):
        value = mutual_loss(logits, call(labels, **settings))[0]
        return value * scale

    return step


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("backend", "settings"),
                         [*(("aot_eager", s) for s in OPTIONS), ("inductor", {}),
                          ("inductor", {"reduction": "none"})])  # fmt: skip
def test_compiled_code_gives_the_same_numbers(backend, settings, stacked):
    z = leaves(stacked=stacked)
    y, scale = labels_for(z), torch.tensor(1.5, device=DEVICE)
    step = compiled(backend, **settings)
    value = step(z, y, scale)
    same([value], [loss(z, **settings) * scale])
    same(torch.autograd.grad(value.sum(), z),
         torch.autograd.grad((loss(z, **settings) * scale).sum(), z))  # fmt: skip
    with torch.no_grad():
        same([step(z, y, scale)], [value])


@pytest.mark.parametrize("stacked", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_compilation_serves_every_batch_size(stacked):
    step = compiled("aot_eager", dynamic=True)
    for N in (64, 63, 2, 130, 48, 7):
        z = leaves(N=N, stacked=stacked)
        y = labels_for(z)
        value = step(z, y, torch.ones((), device=DEVICE))
        same([value], [loss(z)])
        same(torch.autograd.grad(value.sum(), z), torch.autograd.grad(loss(z).sum(), z))


def test_compiled_code_takes_one_tensor_as_two_peers():
    z = leaves(K=1)[0]
    step = compiled("aot_eager")
    value = step([z, z], labels_for([z]), torch.ones((), device=DEVICE))
    same(torch.autograd.grad(value.sum(), z), torch.autograd.grad(loss([z, z]).sum(), z))


def test_compiled_code_takes_peers_in_different_dtypes():
    z = [leaves(dtype=d, seed=k)[k] for k, d in enumerate(DTYPES)]
    step = compiled("aot_eager")
    value = step(z, labels_for(z), torch.ones((), device=DEVICE))
    grads = torch.autograd.grad(value.sum(), z)
    assert [g.dtype for g in grads] == list(DTYPES)
    same([g.float() for g in grads],
         [g.float() for g in torch.autograd.grad(loss(z).sum(), z)])  # fmt: skip


@torch._dynamo.config.patch(error_on_recompile=True)
def test_weights_in_tensors_change_without_compiling_anew():
    weight = torch.tensor(0.5, device=DEVICE)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits, labels, kl_weight):
        return mutual_loss(logits, call(labels, kl_weight=kl_weight))[0]

    z = leaves()
    for value in (0.5, 2.0, 0.0):
        weight.fill_(value)
        same([step(z, labels_for(z), weight)], [loss(z, kl_weight=value)])


def test_no_argument_that_varies_compiles_a_kernel_anew():
    """N, strides of labels and gradients, ignore_index: never specialised on 1 or multiples of 16.
    Read from the kernels as a GPU would run them, in a process without the interpreter."""
    code = """
from fastdml_kernels.coupled_rows import coupled_rows
from fastdml_kernels.register_rows import register_rows
from fastdml_kernels.wide_rows import wide_rows
from fastdml_kernels.label_counts import count_labels
from fastdml_kernels.scale_grads import scale_rows
for kernel in (register_rows, wide_rows, coupled_rows, count_labels, scale_rows):
    free = {p.name for p in kernel.params if p.do_not_specialize or p.is_constexpr}
    floats = {"ce_weight", "kl_weight", "temperature", "label_smoothing"}
    pointers = {"logits", "grads", "labels", "peer_weights", "class_weight", "sample_weight",
                "upstream", "losses", "stats", "partials", "scratch", "counter", "counts"}
    left = {p.name for p in kernel.params} - free - floats - pointers
    assert not left, (kernel, left)
"""
    done = run_code(code, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("settings", OPTIONS)
def test_no_host_synchronisation(settings):
    z = leaves(N=64, C=100)
    arguments = call(labels_for(z), **{**settings, "class_weight": False})
    upstream = torch.rand(loss(z, **{**settings, "class_weight": False}).shape, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mutual_loss(z, arguments)[0].backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("N", [64, 5000])
@pytest.mark.parametrize("settings", OPTIONS)
def test_forward_and_backward_in_a_cuda_graph(settings, N):
    """New values in the same memory, replayed; several launches in one graph, and one outside.
    Twice a gradient, and the rounded sum of both, are as exact as three times it."""
    z, weight = leaves(N=N), torch.ones((), device=DEVICE)
    y = labels_for(z)
    settings = {**settings, "kl_weight": weight}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(mutual_loss(z, call(y, **settings))[0].sum(), z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with without_collector(), torch.cuda.graph(graph):
        values = [mutual_loss(z, call(y, **settings))[0] for _ in range(2)]
        grads = torch.autograd.grad(values[0].sum() + 2 * values[1].sum(), z)
    for seed in (1, 2, 3):
        with torch.no_grad():
            for x, new in zip(z, leaves(N=N, seed=seed), strict=True):
                x.copy_(new)
        weight.fill_(seed)
        graph.replay()
        expected = mutual_loss(z, call(y, **settings))[0]
        same(values, [expected, expected])
        same(grads, [3 * g for g in torch.autograd.grad(expected.sum(), z)])


@pytest.mark.gpu
def test_streams_side_by_side_do_not_share_their_sums():
    z = leaves(N=4096, C=100)
    y, streams = labels_for(z), [torch.cuda.Stream() for _ in range(4)]
    with torch.no_grad():  # as below: the kernel with gradients may differ from it by a rounding
        expected = mutual_loss(z, call(y))[0]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream), torch.no_grad():
                results.append(mutual_loss(z, call(y))[0])
    torch.cuda.synchronize()
    assert all(torch.equal(r, expected) for r in results)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 64, 100), (8, 1000, 100), (2, 300, 32_000)])
def test_many_programs_give_the_same_bits_every_time(shape):
    """A race between the programs would show as another sum."""
    z = [torch.randn(shape[1:], device=DEVICE) for _ in range(shape[0])]
    arguments = call(labels_for(z))
    first = losses_and_grads(z, arguments, range(len(z)))
    for _ in range(200):
        again = losses_and_grads(z, arguments, range(len(z)))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))


@pytest.mark.gpu
def test_every_batch_size_runs_the_same_compiled_kernel():
    from fastdml_kernels.register_rows import register_rows

    compiled_kernels = register_rows.device_caches[torch.cuda.current_device()][0]
    losses_and_grads(z := leaves(N=64), call(labels_for(z)), range(len(z)))
    before = len(compiled_kernels)
    for N in (1, 2, 16, 17, 128, 1000):
        losses_and_grads(z := leaves(N=N), call(labels_for(z)), range(len(z)))
    assert len(compiled_kernels) == before


@pytest.mark.gpu
def test_the_kernel_runs_where_the_logits_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = loss(z := leaves())
    away = [x.detach().to("cuda:1").requires_grad_() for x in z]
    with torch.cuda.device(0):
        value = mutual_loss(away, call(labels_for(z).to("cuda:1")))[0]
        value.sum().backward()
    same([value.cpu()], [expected.cpu()])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("N", "C"), [(2**25, 100), (20_000, 128_256)])
def test_more_than_2_to_the_31_elements(N, C):
    """The last rows are right: their offsets need 64 bits.

    Beside them run copies, as aligned as the whole, and as many rows as fill whole tiles, so that
    the same compiled code computes each row, and bits can be compared."""
    last = 64
    if torch.cuda.get_device_properties(0).total_memory < 5 * N * C * 2:
        pytest.skip(f"needs {5 * N * C * 2 >> 30} GiB")
    z = [torch.randn(N, C, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    y = torch.randint(0, C, (N,), device=DEVICE)
    grads = losses_and_grads(z, call(y, reduction="sum", want_stats=False), range(2))[2]
    end, labels = [x[-last:].clone() for x in z], y[-last:].clone()
    tail = losses_and_grads(end, call(labels, reduction="sum", want_stats=False), range(2))[2]
    assert all(torch.equal(g[-last:], t) for g, t in zip(grads, tail, strict=True))
