"""Peers that only teach, weights of rows, divergences and softer gates, from the public functions:
who gets a gradient, by which route, and what is refused."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fastdml_kernels import cpu_rows, loss_op
from fastdml_kernels.reference import mutual_loss_reference
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastdml import MutualLoss, linear_mutual_loss, mutual_loss, mutual_losses
from fastdml.loss_options import call_with

K, N, C = 3, 6, 10
TIMES = torch.linspace(0.0, 2.5, N)
EDGES = torch.rand(K, K, generator=torch.Generator().manual_seed(0))
EVERYTHING = {
    "divergence": "jsd", "jsd_beta": 0.3, "gate": "confidence", "sample_weight": TIMES,
    "temperature": 2.0, "peer_weights": EDGES,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "everything": EVERYTHING,
    "rows": {
        "reduction": "none",
        "gate": "entropy",
        "divergence": "reverse",
        "mimic_ignored": True,
    },
    "taught": {"detach_targets": False, "divergence": "jsd", "target": "ensemble"},
    "taught rows": {"detach_targets": False, "reduction": "none", "sample_weight": TIMES},
}  # fmt: skip


def data(
    requires: tuple[int, ...] = (0, 1, 2), dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = [(3 * torch.randn(N, C, generator=g)).to(dtype) for _ in range(K)]
    y = torch.randint(0, C, (N,), generator=g)
    y[2] = -100
    return [x.requires_grad_(k in requires) for k, x in enumerate(z)], y


def exact_gradients(z: list[Tensor], y: Tensor, upstream: Tensor, **options) -> list[Tensor]:
    """The true derivatives of upstream * losses, of all peers, in float64."""
    call = call_with(y, False, **options)
    leaves = [x.detach().double().requires_grad_() for x in z]
    weights = {name: options[name] for name in options.keys() & {
        "temperature", "ce_weight", "kl_weight", "peer_weights", "sample_weight"}}  # fmt: skip
    losses, _ = mutual_loss_reference(leaves, y, call.options, **weights)
    return list(torch.autograd.grad(losses, leaves, upstream.double()))


def ramp(losses: Tensor) -> Tensor:
    return torch.linspace(-1, 2, losses.numel()).view(losses.shape)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=2e-5, atol=2e-6)


# ---- who learns


@pytest.mark.parametrize(
    "students",
    [[0, 2], (2, 0), [True, False, True], torch.tensor([0, 2]), torch.tensor([True, False, True]),
     np.array([0, 2]), np.array([True, False, True]), [np.int64(0), np.int64(2)]],
    ids=str,
)  # fmt: skip
def test_students_in_every_form_are_those_whose_logits_require_a_gradient(students):
    z, y = data()
    mutual_loss(z, y, students=students).sum().backward()
    by_need, _ = data(requires=(0, 2))
    mutual_loss(by_need, y).sum().backward()
    assert z[1].grad is None
    for k in (0, 2):
        assert torch.equal(z[k].grad, by_need[k].grad)
    loss = MutualLoss(students=students)
    assert loss.options.students == (0, 2)
    assert torch.equal(loss(z, y), mutual_loss(z, y))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("students", [(1,), (0, 2)])
def test_the_gradient_is_the_true_one_of_the_students(monkeypatch, students, options, native):
    """Of all K losses, teachers' too, whatever their own gradient is; separate and stacked."""
    if not native:
        monkeypatch.setattr(cpu_rows, "library", lambda: None)
    z, y = data()
    losses = mutual_loss(z, y, students=students, **options)
    upstream = ramp(losses)
    exact = exact_gradients(z, y, upstream, **options)
    losses.backward(upstream)
    stacked = torch.stack([x.detach() for x in z]).requires_grad_()
    mutual_loss(stacked, y, students=students, **options).backward(upstream)
    for k in range(K):
        if k in students:
            close(z[k].grad, exact[k])
            close(stacked.grad[k], exact[k])
        else:
            assert z[k].grad is None
            assert (stacked.grad[k] == 0).all()


def test_a_student_that_requires_no_gradient_gets_none():
    z, y = data(requires=(1,))
    losses = mutual_loss(z, y, students=[0, 1])
    losses.sum().backward()
    assert z[0].grad is None
    assert z[1].grad is not None
    assert not mutual_loss(z, y, students=[0, 2]).requires_grad
    with torch.no_grad():
        assert not mutual_loss(z, y, students=[1]).requires_grad


@pytest.mark.parametrize("mode", [nullcontext, lambda: FlopCounterMode(display=False)])
def test_a_backward_leaves_the_graphs_of_those_who_only_teach_alone(mode):
    """A peer that learns from another loss: its graph is neither freed nor its hooks called."""
    z, y = data()
    taught = [x * x for x in z]
    seen: list[object] = []
    taught[1].register_hook(seen.append)
    with mode():
        losses = mutual_loss(taught, y, students=[0, 2])
    losses.sum().backward()
    assert seen == []
    taught[1].sum().backward()
    assert torch.equal(z[1].grad, 2 * z[1].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_where_only_the_teachers_require_a_gradient(dtype):
    """As where nobody does: float64 is computed in torch, float32 in native code."""
    z, y = data(requires=(1,), dtype=dtype)
    exact = mutual_loss([x.detach() for x in z], y)
    for losses in (mutual_loss(z, y, students=[0]), torch.stack(mutual_losses(z, y, students=[0]))):
        assert not losses.requires_grad
        assert torch.equal(losses, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_second_backward_gives_the_same(options, dtype):
    z, y = data(dtype=dtype)
    losses = mutual_loss(z, y, students=[2], **options)
    (first,) = torch.autograd.grad(losses.sum(), z[2], retain_graph=True)
    kept = first.clone()
    first.zero_()
    (again,) = torch.autograd.grad(losses.sum(), z[2])
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)


def test_gradients_infinite_for_a_teacher_stay_out_of_its_rows():
    z, y = data()
    upstream = torch.tensor([1.0, torch.inf, torch.nan])
    for run in (mutual_loss, torch.compile(mutual_loss, backend="aot_eager", fullgraph=True)):
        stacked = torch.stack([x.detach() for x in z]).requires_grad_()
        run(stacked, y, students=[0]).backward(upstream)
        assert (stacked.grad[1:] == 0).all()
        assert stacked.grad[0].isfinite().all()


def test_a_teacher_has_no_memory_for_a_gradient():
    """In bytes that the call allocates: of four peers, one gradient and not four."""
    if cpu_rows.library() is None:
        pytest.skip("in torch the passes need memory of their own")
    rows, classes = 512, 1000
    y = torch.zeros(rows).long()

    def allocated(learning: int) -> int:
        z = [torch.randn(rows, classes).requires_grad_(k < learning) for k in range(4)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            mutual_loss(z, y).sum().backward()
        return sum(max(e.self_cpu_memory_usage, 0) for e in seen.events())

    of_one, of_all = allocated(1), allocated(4)
    gradient = 4 * rows * classes
    assert of_one < 1.5 * gradient
    assert of_all - of_one > 2.5 * gradient


# ---- the other functions


def test_value_and_grad_is_of_students_alone():
    z, y = data()
    fixed = [x.detach() for x in z]
    whole = MutualLoss(**{k: v for k, v in EVERYTHING.items() if k != "sample_weight"})
    _, _, every = whole.value_and_grad(fixed, y, TIMES)
    assert all(g is not None for g in every)
    some = MutualLoss(
        students=[0, 2], **{k: v for k, v in EVERYTHING.items() if k != "sample_weight"}
    )
    losses, stats, grads = some.value_and_grad(fixed, y, TIMES)
    assert grads[1] is None
    for k in (0, 2):
        torch.testing.assert_close(grads[k], every[k], rtol=1e-6, atol=1e-8)
    assert losses.shape == stats.ce.shape == (K,)
    (stacked,) = some.value_and_grad(torch.stack(fixed), y, TIMES)[2]
    assert (stacked[1] == 0).all()
    assert torch.equal(stacked[0], grads[0])
    by_need = whole.value_and_grad(data(requires=(1,))[0], y, TIMES)[2]
    assert [g is None for g in by_need] == [True, False, True]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["everything", "rows"])
def test_losses_apart_are_differentiable_for_students_alone(name, traced):
    z, y = data()
    torch._dynamo.reset()
    options = VARIANTS[name]
    run = torch.compile(mutual_losses, backend="aot_eager", fullgraph=True) if traced else (
        mutual_losses)  # fmt: skip
    losses = run(z, y, students=[2], **options)
    assert [loss.requires_grad for loss in losses] == [False, False, True]
    losses[2].sum().backward()
    upstream = torch.zeros_like(mutual_loss(z, y, **options).detach())
    upstream[2] = 1
    close(z[2].grad, exact_gradients(z, y, upstream, **options)[2])
    assert z[0].grad is None
    assert z[1].grad is None


@pytest.mark.parametrize("traced", [False, True])
def test_a_loss_scale_comes_before_students_gradients_are_rounded_to_float16(traced):
    """By every route; without the scale they would be 0."""
    small = {"ce_weight": 1e-7, "kl_weight": 1e-7, "gate": "entropy"}
    z, y = data(dtype=torch.float16)
    upstream = torch.full((K,), 2.0**20)
    upstream[1] = 0
    exact = exact_gradients(z, y, upstream, **small)
    torch._dynamo.reset()
    for function, stacked in ((mutual_loss, True), (mutual_loss, False), (mutual_losses, False)):
        run = torch.compile(function, backend="aot_eager", fullgraph=True) if traced else function
        leaves = [x.detach().requires_grad_() for x in z]
        logits = torch.stack([x.detach() for x in z]).requires_grad_() if stacked else leaves
        losses = run(logits, y, students=[0, 2], **small)
        (losses[0] * upstream[0] + losses[2] * upstream[2]).backward()
        for k in (0, 2):
            found = logits.grad[k] if stacked else leaves[k].grad
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.double(), exact[k], rtol=1e-3, atol=1e-7)
        assert (logits.grad[1] == 0).all() if stacked else leaves[1].grad is None


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("everything", False), ("rows", True), ("taught", True), ("taught rows", False)],
)
def test_compiled_code_gives_the_same(name, stacked):
    options = VARIANTS[name]

    def run(logits, labels, students):
        return mutual_loss(logits, labels, students=students, **options)

    z, y = data()
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = []
    for function in (run, compiled):
        leaves = [x.detach().requires_grad_() for x in z]
        logits = torch.stack([x.detach() for x in z]).requires_grad_() if stacked else leaves
        losses = function(logits, y, [0, 2])
        losses.backward(ramp(losses))
        grads = [logits.grad] if stacked else [leaves[0].grad, leaves[2].grad]
        found.append([losses.detach(), *grads])
        assert stacked or leaves[1].grad is None
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_compilation_serves_every_number_of_rows_and_their_weights():
    torch._dynamo.reset()
    step = torch.compile(
        lambda z, y, w: mutual_loss(z, y, students=[0], sample_weight=w, gate="entropy"),
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    for rows in (64, 63, 5, 40):
        z = [torch.randn(rows, C).requires_grad_(k == 0) for k in range(2)]
        y, w = torch.randint(0, C, (rows,)), torch.rand(rows)
        torch.testing.assert_close(
            step(z, y, w), mutual_loss(z, y, students=[0], sample_weight=w, gate="entropy")
        )


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("everything", False), ("rows", True), ("taught", False), ("taught rows", True)],
)
def test_opcheck(name, stacked):
    options = VARIANTS[name]
    z, y = data()
    z = [x.detach() for x in z]
    logits = [torch.stack(z)] if stacked else z
    call = call_with(y, True, **options)
    upstream = None if call.options.detach_targets else ramp(mutual_loss(z, y, **options))
    arguments = (logits, upstream, [0, 2], True, *loss_op.flatten(call))
    results = torch.library.opcheck(torch.ops.fastdml.mutual_loss.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_a_mode_that_looks_at_operations_changes_nothing():
    z, y = data()
    fixed = [x.detach() for x in z]
    loss = MutualLoss(students=[0, 2], divergence="jsd", gate="entropy")
    for logits in (fixed, torch.stack(fixed)):
        expected = loss.value_and_grad(logits, y, TIMES)[2]
        with FlopCounterMode(display=False):
            found = loss.value_and_grad(logits, y, TIMES)[2]
        for one, two in zip(found, expected, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
    with FlopCounterMode(display=False):
        mutual_loss(z, y, students=[1], sample_weight=TIMES).sum().backward()
    assert [x.grad is None for x in z] == [True, False, True]


def test_a_loop_of_plain_distillation():
    """A frozen network beside one that learns, under autocast and with a loss scale."""
    torch.manual_seed(0)
    teacher, student = nn.Linear(8, C).eval().requires_grad_(False), nn.Linear(8, C)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(64, 8)
    y = teacher(x).argmax(1)
    seen = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            losses = mutual_loss([student(x), teacher(x)], y, temperature=2.0, divergence="jsd")
        optimizer.zero_grad()
        scaler.scale(losses[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(losses[0].item())
    assert seen[-1] < 0.6 * seen[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_logits_and_weights_from_inference_mode():
    z, y = data(requires=(0,))
    expected = mutual_loss(z, y, sample_weight=TIMES, gate="entropy")
    with torch.inference_mode():
        teachers, times = [x.clone() for x in z[1:]], TIMES.clone()
    for options in ({}, {"detach_targets": False}):
        losses = mutual_loss([z[0], *teachers], y, sample_weight=times, gate="entropy", **options)
        torch.testing.assert_close(losses, expected)
        losses.sum().backward()


def test_weights_of_rows_changed_before_a_backward_that_reads_them_are_noticed():
    z, y = data()
    times = TIMES.clone()
    losses = mutual_loss(z, y, sample_weight=times, detach_targets=False)
    times.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_symmetric_is_another_name_for_jeffreys():
    z, y = data()
    for options in ({}, {"target": "ensemble", "temperature": 2.0}, {"detach_targets": False}):
        one, two = (
            [losses.detach(), *torch.autograd.grad(losses.sum(), z)]
            for losses in (mutual_loss(z, y, symmetric=True, **options),
                           mutual_loss(z, y, divergence="jeffreys", **options))
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert MutualLoss(symmetric=True, divergence="jeffreys").options.divergence == "jeffreys"


# ---- what is refused, in one line with the remedy

WRONG = {
    "out of range": ({"students": [0, 3]}, ValueError, r"hold 3 with K = 3 .* give 0 to 2"),
    "negative": ({"students": [-1]}, ValueError, "counted from 0"),
    "twice": ({"students": [1, 1]}, ValueError, "named twice; name each once"),
    "none": ({"students": []}, ValueError, "nobody learns; name at least one peer"),
    "none of a mask": ({"students": [False] * 3}, ValueError, "nobody learns"),
    "short mask": (
        {"students": [True, False]},
        ValueError,
        "mask of 2 for K = 3 .*one bool a peer",
    ),
    "long mask": ({"students": [True] + [False] * 4}, ValueError, "mask of 5 for K = 3"),
    "both": ({"students": [True, 1, 2]}, TypeError, "indices alone, or a mask of bools alone"),
    "a number": ({"students": 1}, TypeError, "give a list of peers' indices"),
    "a name": ({"students": "first"}, TypeError, "give a list of peers' indices"),
    "floats": ({"students": [0.0]}, TypeError, "indices alone"),
    "matrix": ({"students": torch.ones(3, 1).bool()}, ValueError, "one dimension on the CPU"),
    "beta": ({"divergence": "jsd", "jsd_beta": 1.5}, ValueError, "share of the mixture, 0 to 1"),
    "nan": ({"divergence": "jsd", "jsd_beta": float("nan")}, ValueError, "0 to 1"),
    "beta alone": ({"jsd_beta": 0.2}, ValueError, "belongs to divergence='jsd'"),
    "divergence": ({"divergence": "js"}, ValueError, "choose one of 'forward', 'reverse'"),
    "gate": ({"gate": "certainty"}, ValueError, "'confidence', 'entropy'"),
    "symmetric": ({"symmetric": True, "divergence": "jsd"}, ValueError, "give one of the two"),
    "weights' shape": ({"sample_weight": torch.ones(N + 1)}, ValueError, rf"give \({N},\) on cpu"),
    "column": ({"sample_weight": torch.ones(N, 1)}, ValueError, rf"give \({N},\) on cpu"),
    "weights' dtype": ({"sample_weight": torch.ones(N).long()}, TypeError, "cast it to a floating"),
    "list": ({"sample_weight": [1.0] * N}, TypeError, "of type list: give a tensor"),
    "device": ({"sample_weight": torch.ones(N, device="meta")}, ValueError, "on meta: give"),
    "gradient": ({"sample_weight": torch.ones(N).requires_grad_()}, ValueError, "requires a grad"),
    "negative weight": ({"sample_weight": -TIMES}, ValueError, "sample_weight holds -.* give 0"),
    "no weight": ({"sample_weight": TIMES * torch.nan}, ValueError, "holds nan: .* finite numbers"),
    "endless weight": ({"sample_weight": TIMES + torch.inf}, ValueError, "sample_weight holds inf"),
    "beta's type": ({"divergence": "jsd", "jsd_beta": "0.3"}, TypeError, "='0.3': give a number"),
    "smoothing's type": ({"label_smoothing": None}, TypeError, "=None: give a number, 0 to 1"),
    "other name": ({"tau": 4.0}, TypeError, "tau is no option of the loss; did you mean temperat"),
    "no name": ({"qqqq": 1}, TypeError, "qqqq is no option .*; there is temperature, ce_weight"),
    "sparse": ({"sample_weight": torch.ones(N).to_sparse()}, TypeError, "sparse_coo tensor"),
}


@pytest.mark.parametrize(("options", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_with_its_remedy(options, error, match):
    z, y = data()
    for fine in ({}, {"sample_weight": TIMES}, {"students": [0]}):  # remembered as in order
        mutual_loss(z, y, **fine)
    for function in (mutual_loss, mutual_losses):
        with pytest.raises(error, match=match) as found:
            function(z, y, **options)
        assert "\n" not in str(found.value)


def test_rows_of_more_dimensions_are_refused_with_what_makes_them_flat():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    for function in (mutual_loss, mutual_losses):
        with pytest.raises(ValueError, match=r"; flatten\(0, -2\) makes rows"):
            function([torch.zeros(2, 3, 5)] * 2, tokens)
    with pytest.raises(ValueError, match=r"; flatten\(0, -2\) makes rows"):
        linear_mutual_loss([torch.zeros(2, 3, 4)], [torch.zeros(5, 4)], tokens)


def test_numbers_of_numpy_warn_of_nothing():
    z, y = data()
    ours = mutual_loss(z, y, temperature=4.0, kl_weight=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mutual_loss(z, y, temperature=np.float32(4), kl_weight=np.float32(0.5))
    assert torch.equal(found, ours)


def test_a_module_refuses_a_mask_of_another_length_and_weights_of_one_batch():
    z, y = data()
    loss = MutualLoss(students=[True, False])
    with pytest.raises(ValueError, match="mask of 2 for K = 3"):
        loss(z, y)
    assert loss(z[:2], y).shape == (2,)
    with pytest.raises(ValueError, match="belongs to a batch"):
        MutualLoss(sample_weight=TIMES)
