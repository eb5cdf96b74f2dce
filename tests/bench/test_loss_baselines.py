"""What the loss is measured against computes the same loss, and what does not is found out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench import bench_loss, timing
from bench.baselines import summed
from bench.bench_loss import FULL, QUICK, Case
from fastdml import mutual_loss

CPU = torch.device("cpu")
APEX = Path(__file__).parents[2] / "bench/baselines/apex_xentropy.py"


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_every_contender_has_our_losses_and_gradients(K, direction):
    names = agreeing(Case(K, 6, 10, "float32"), direction)
    assert {"ours", "pairwise", "closed"} <= names


def agreeing(case: Case, direction: str) -> set[str]:
    """The contenders, all of which have our losses and gradients."""
    logits, labels = bench_loss._inputs(case, CPU, seed=0)
    ours = bench_loss._call("ours", case, direction, CPU)(logits, labels)
    names = bench_loss._names(case, direction, CPU, full=False)
    names = [n for n in names if not n.endswith("-c") and (case.K > 1 or n != "pydml")]
    for name in names:  # pydml needs two peers
        result = bench_loss._call(name, case, direction, CPU)(logits, labels)
        bench_loss._check(result, ours, case, direction)
    return set(names)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jeffreys", "jsd"])
def test_the_formula_of_distillation_has_our_loss_and_gradient(divergence):
    case = Case(2, 6, 10, "float32", divergence)
    assert agreeing(case, "forward_backward") == {"ours", "direct", "formula"}


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_the_least_bytes(direction):
    """Each of K peers is read, each student's gradient written."""
    gradients = 3 if direction == "forward_backward" else 0
    assert Case(3, 5, 7, "bfloat16").least_bytes(direction) == (3 + gradients) * 5 * 7 * 2
    written = gradients > 0
    assert Case(2, 5, 7, "float32", "jsd").least_bytes(direction) == (2 + written) * 5 * 7 * 4


def test_the_memory_of_a_call():
    """A result and what it was made from, both of them new, and what was there before."""
    z = torch.zeros(1 << 18)  # 1 MiB
    assert 2 << 20 <= timing.extra_memory(lambda: (z + 1).exp(), CPU) <= (2 << 20) + 4096
    assert timing.extra_memory(lambda: z.exp_(), CPU) == 0


@pytest.mark.parametrize("wrong", ["loss", "gradient", "nan", "fewer"])
def test_a_contender_that_differs_is_found_out(wrong):
    case = Case(2, 6, 10, "float32")
    logits, labels = bench_loss._inputs(case, CPU, seed=0)
    losses = mutual_loss(logits, labels)
    ours = losses, summed.gradients(losses, logits)
    other = losses.detach().clone(), [g.clone() for g in ours[1]]
    bench_loss._check(other, ours, case, "forward_backward")
    if wrong == "loss":
        other[0][1] *= 1.001
    elif wrong == "gradient":
        other[1][1][3, 4] += 1e-3 * ours[1][1].abs().max()
    elif wrong == "nan":
        other[1][0][0, 0] = torch.nan
    else:
        other[1].pop()
    with pytest.raises((AssertionError, ValueError)):
        bench_loss._check(other, ours, case, "forward_backward")


def test_the_shapes_are_there():
    for device in ("cpu", "cuda"):
        shapes = {case[:3] for case in FULL[device]}
        assert {(K, N, 100) for K in (2, 3, 4, 8) for N in (64, 1024)} <= shapes
        assert {751, 1000, 21_841, 32_768, 128_256} <= {C for _, _, C in shapes}
        assert set(QUICK[device]) <= set(FULL[device])
        distilled = {case.divergence for case in QUICK[device]} - {""}
        assert distilled == {"forward", "reverse", "jeffreys", "jsd"}


class Xentropy(torch.autograd.Function):
    """As Apex's: rows' losses; which dtypes it takes is its kernel's own check."""

    @staticmethod
    def forward(ctx, logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        assert smoothing == 0.0
        if half_to_float and logits.dtype == torch.float32:
            raise RuntimeError("conversion is supported for Half and BFloat16 type only")
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        ctx.save_for_backward(logits, labels, labels == padding_idx)
        return losses.masked_fill(labels == padding_idx, 0)

    @staticmethod
    def backward(ctx, slope):
        logits, labels, padding = ctx.saved_tensors
        grad = logits.float().softmax(1) - F.one_hot(labels, logits.shape[1])
        grad *= slope.masked_fill(padding, 0)[:, None]
        return grad.to(logits.dtype), None, None, None, None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apex_is_called_as_it_wants(monkeypatch, dtype):
    """Class 0 among the labels, which its default padding would ignore."""
    package = ModuleType("apex.contrib.xentropy")
    package.SoftmaxCrossEntropyLoss = Xentropy
    for name in ("apex", "apex.contrib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "apex.contrib.xentropy", package)
    spec = importlib.util.spec_from_file_location("apex_stood_in_for", APEX)
    apex_xentropy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(apex_xentropy)
    case = Case(3, 8, 10, dtype)
    logits, labels = bench_loss._inputs(case, CPU, seed=0)
    labels[:3] = 0
    ours, theirs = mutual_loss(logits, labels), apex_xentropy.losses(logits, labels)
    bench_loss._check(
        (theirs, summed.gradients(theirs, logits)),
        (ours, summed.gradients(ours, logits)), case, "forward_backward",
    )  # fmt: skip
