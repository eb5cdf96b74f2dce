"""What the host hands to the CUDA driver: each argument of each kernel is the right one.

Triton's real compiler and launcher run on a stand-in for the driver (`bench/stand_in`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastdml_kernels import Call, Options, losses_and_grads
from fastdml_kernels.augment import augment
from fastdml_kernels.augment_options import Augment
from fastdml_kernels.stats_layout import stats_layout
from on_stand_in import scenarios_of

from fastdml import mutual_loss, mutual_losses

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in")


def peers(K: int, N: int, C: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """K logits (N, C) that want gradients."""
    return [torch.randn(N, C).to(dtype).requires_grad_() for _ in range(K)]


def labels_of(N: int, C: int) -> torch.Tensor:
    return torch.randint(C, (N,))


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def compared(launch: Any, kernel: str, **wanted: Any) -> dict[str, Any]:
    """The kernel's name and arguments, as they were and as they should have been."""
    values = {"kernel": launch.kernel, **launch.arguments}
    return {"got": {name: values[name] for name in ("kernel", *wanted)},
            "wanted": {"kernel": kernel, **wanted}}  # fmt: skip


def call_of(labels: torch.Tensor, options: Options, **changed: Any) -> Call:
    plain = Call(labels, options, 1.0, 1.0, 1.0, None, None, want_stats=True)
    return plain._replace(**changed)


def holds(case: dict[str, Any]) -> None:
    assert case["got"] == case["wanted"]


# ---- register rows


def register_rows(gpu):
    """Every kind of argument at once: views with strides, labels of 32 bits, weights."""
    wide = torch.randn(3, 51, 80)
    logits = [w[1:, 4:74] for w in wide.unbind()]
    labels = torch.randint(70, (2, 50), dtype=torch.int32).t()[:, 0]
    class_weight, peer_weights = torch.rand(70), torch.rand(3, 3)
    call = call_of(
        labels, Options(ignore_index=7), temperature=3.0, ce_weight=0.5, kl_weight=2.0,
        class_weight=class_weight, peer_weights=peer_weights,
    )  # fmt: skip
    losses, stats, grads = losses_and_grads(logits, call, True)
    (launch,) = gpu.launches()
    return compared(
        launch, "register_rows",
        logits=addresses(logits), grads=addresses(grads), labels=labels.data_ptr(),
        peer_weights=peer_weights.data_ptr(), class_weight=class_weight.data_ptr(),
        losses=losses.data_ptr(), stats=stats.data_ptr(),
        N=50, label_stride=1, ignore_index=7, ce_weight=0.5, kl_weight=2.0, temperature=3.0,
        label_smoothing=0.0, K=3, C=70, STRIDES=[[80, 1, 70]] * 3, NEED_GRAD=True, STATS=True,
    )  # fmt: skip


def test_register_rows(seen):
    holds(seen(register_rows))


def every_other_label(gpu):
    logits, labels = peers(2, 30, 70), labels_of(60, 70)[::2]
    with torch.no_grad():
        losses = mutual_loss(logits, labels)
    (launch,) = gpu.launches()
    return compared(
        launch, "register_rows", logits=addresses(logits), grads=[], labels=labels.data_ptr(),
        losses=losses.data_ptr(), N=30, label_stride=2, NEED_GRAD=False,
    )  # fmt: skip


def test_labels_of_a_view_without_gradient(seen):
    holds(seen(every_other_label))


def stacked(gpu):
    logits, labels = torch.randn(3, 20, 70, requires_grad=True), labels_of(20, 70)
    losses = mutual_loss(logits, labels)
    losses.sum().backward()
    loss, scale = gpu.launches()
    parts = [grad.data_ptr() for grad in logits.grad.unbind()]
    return [
        compared(loss, "register_rows", logits=addresses(logits.unbind()), grads=parts, N=20),
        compared(scale, "scale_rows", grads=parts, N=20, C=70, STRIDES=[70] * 3),
    ]


def test_stacked_logits(seen):
    for case in seen(stacked):
        holds(case)


def scalars_as_tensors(gpu):
    scalars = {n: torch.ones(()) for n in ("temperature", "ce_weight", "kl_weight")}
    logits = peers(2, 10, 70)
    mutual_loss(logits, labels_of(10, 70), **scalars)
    (launch,) = gpu.launches()
    flags = {"CE_POINTER": True, "KL_POINTER": True, "T_POINTER": True, "TEMPERED": True}
    pointers = {name: value.data_ptr() for name, value in scalars.items()}
    return compared(launch, "register_rows", **pointers, **flags)


def test_scalars_in_tensors_are_pointers(seen):
    holds(seen(scalars_as_tensors))


# ---- wide and coupled rows, and those whose loss has an upstream gradient


def wide_rows(gpu):
    logits, labels = peers(2, 6, 9000, torch.bfloat16), labels_of(6, 9000)
    call = call_of(labels, Options(label_smoothing=0.25), kl_weight=0.5)
    losses, stats, grads = losses_and_grads([z.detach() for z in logits], call, True)
    (launch,) = gpu.launches()
    return compared(
        launch, "wide_rows", logits=addresses(logits), grads=addresses(grads),
        labels=labels.data_ptr(), losses=losses.data_ptr(), stats=stats.data_ptr(),
        upstream=None, N=6, label_stride=1, ce_weight=1.0, kl_weight=0.5, temperature=1.0,
        label_smoothing=0.25, K=2, C=9000, STRIDES=[[9000, 1, 9000]] * 2, NEED_GRAD=True,
    )  # fmt: skip


def test_wide_rows(seen):
    holds(seen(wide_rows))


def coupled_rows(gpu):
    """Gradients that flow into the teachers come from the backward, with the losses' own."""
    logits, labels = peers(2, 6, 70), labels_of(6, 70)
    upstream = torch.rand(6, 2).t()
    losses = mutual_loss(logits, labels, detach_targets=False, reduction="none")
    losses.backward(upstream)
    forward, backward = gpu.launches()
    common = {"logits": addresses(logits), "labels": labels.data_ptr(), "N": 6, "K": 2, "C": 70}
    return [
        compared(forward, "wide_rows", **common, losses=losses.data_ptr(), grads=[]),
        compared(
            backward, "coupled_rows", **common, grads=addresses([z.grad for z in logits]),
            upstream=upstream.data_ptr(), u_stride_k=1, u_stride_n=2, REDUCTION="none",
            DETACH=False, SYMMETRIC=False,
        ),
    ]  # fmt: skip


def test_coupled_rows(seen):
    for case in seen(coupled_rows):
        holds(case)


def float16(gpu):
    logits, labels = peers(2, 8, 70, torch.float16), labels_of(8, 70)
    upstream = torch.full((2,), 1024.0)
    mutual_loss(logits, labels).backward(upstream)
    forward, backward = gpu.launches()
    return [
        compared(forward, "register_rows", logits=addresses(logits), grads=[]),
        compared(
            backward, "wide_rows", logits=addresses(logits), upstream=upstream.data_ptr(),
            grads=addresses([z.grad for z in logits]), u_stride_k=1, u_stride_n=0,
        ),
    ]  # fmt: skip


def test_float16(seen):
    for case in seen(float16):
        holds(case)


# ---- scale_rows, count_labels, augment


def scaled(gpu):
    cases = []
    for reduction, upstream, strides in (
        ("mean", torch.rand(()).expand(3), [0, 0]),
        ("mean", torch.rand(6)[::2], [2, 0]),
        ("none", torch.rand(40, 3).t(), [1, 3]),
    ):
        logits = peers(3, 40, 70)
        mutual_loss(logits, labels_of(40, 70), reduction=reduction).backward(upstream)
        *_, launch = gpu.launches()
        wanted = {"grads": addresses([z.grad for z in logits]), "upstream": upstream.data_ptr()}
        strides_wanted = dict(zip(("g_stride_k", "g_stride_n"), strides, strict=True))
        cases.append(compared(launch, "scale_rows", **wanted, **strides_wanted, N=40, C=70))
    return cases


def test_scale_rows(seen):
    for case in seen(scaled):
        holds(case)


def own_losses(gpu):
    logits, labels = peers(3, 12, 70), labels_of(12, 70)
    losses = mutual_losses(logits, labels)
    for loss in losses:
        loss.backward()
    first, *scales = gpu.launches()
    cases = [compared(first, "register_rows", logits=addresses(logits), N=12)]
    for z, scale in zip(logits, scales, strict=True):
        wanted = {"grads": [z.grad.data_ptr()], "N": 12, "C": 70, "K": 1}
        cases.append(compared(scale, "scale_rows", **wanted))
    return cases


def test_each_own_loss_scales_its_peers_gradient(seen):
    cases = seen(own_losses)
    assert len(cases) == 4
    for case in cases:
        holds(case)


def counted(gpu):
    N = 5000
    logits, labels, class_weight = peers(2, N, 10), labels_of(N, 10), torch.rand(10)
    mutual_loss(logits, labels, class_weight=class_weight, ignore_index=3)
    count, loss = gpu.launches()
    counts = count.arguments["counts"]
    return [
        compared(
            count, "count_labels", labels=labels.data_ptr(), class_weight=class_weight.data_ptr(),
            N=N, label_stride=1, ignore_index=3, C=10,
        ),
        compared(loss, "register_rows", counts=counts, logits=addresses(logits), N=N),
        {"got": count.grid, "wanted": [1, 1, 1]},
    ]  # fmt: skip


def test_labels_of_a_long_batch_are_counted_first(seen):
    for case in seen(counted):
        holds(case)


def augmented(gpu):
    images, labels = torch.zeros(50, 8, 8, 3, dtype=torch.uint8), labels_of(50, 10)
    samples, repetitions = torch.arange(20), torch.zeros(20, dtype=torch.int64)
    mean, scale, what = torch.rand(3), torch.rand(3), Augment(8, 8, pad=2, flip=True)
    cases = []
    for epoch in (5, torch.tensor([5])):
        gpu.clear()
        out, out_labels = augment(
            images, labels, samples, mean, scale, what, seed=3, epoch=epoch,
            repetitions=repetitions,
        )  # fmt: skip
        (launch,) = gpu.launches()
        tensors = {
            "images": images, "labels": labels, "samples": samples, "repetitions": repetitions,
            "mean": mean, "scale": scale, "out": out, "out_labels": out_labels,
        }  # fmt: skip
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        value = epoch if isinstance(epoch, int) else epoch.data_ptr()
        numbers = {"seed": 3, "epoch": value, "H": 8, "W": 8, "CH": 3, "PAD": 2, "FLIP": True}
        cases.append(compared(launch, "augment_batch", **pointers, **numbers, shapes=None))
        cases.append({"got": launch.grid[0], "wanted": 20})
    return cases


def test_augment(seen):
    for case in seen(augmented):
        holds(case)


# ---- memory that a launch works in


def buffers(gpu):
    """The bytes that a launch writes, (first, end) of each buffer, for several calls."""
    kept, found = [], []
    for options, K, N, C in (
        (Options(), 2, 64, 100),
        (Options(reduction="none"), 3, 33, 50),
        (Options(), 8, 16, 20),
        (Options(), 2, 9, 9000),
        (replace(Options(), symmetric=True), 3, 9, 40),
    ):
        logits, labels = [torch.randn(N, C) for _ in range(K)], labels_of(N, C)
        kept.append(losses_and_grads(logits, call_of(labels, options), True))
        launch = gpu.launches()[-1]
        size, programs, a = stats_layout(K).size, launch.grid[0], launch.arguments
        lengths = {
            "losses": K * N if options.reduction == "none" else K,
            "stats": size, "partials": programs * size, "counter": 1,
            "scratch": programs * 3 * K * K,
        }  # fmt: skip
        spans = {n: [a[n], a[n] + FLOAT * k] for n, k in lengths.items() if n in a}
        for k, (z, grad) in enumerate(zip(a["logits"], a["grads"], strict=True)):
            spans |= {f"logits[{k}]": [z, z + FLOAT * N * C]}
            spans |= {f"grads[{k}]": [grad, grad + FLOAT * N * C]}
        spans["labels"] = [a["labels"], a["labels"] + 8 * N]
        found.append(spans)
    return found


def test_buffers_of_a_launch_do_not_overlap(seen):
    for spans in seen(buffers):
        assert {"losses", "stats", "partials", "counter"} <= spans.keys()
        in_order = sorted((first, end, name) for name, (first, end) in spans.items())
        for (_, end, name), (first, _, other) in itertools.pairwise(in_order):
            assert end <= first, f"{name} runs into {other}"


SCENARIOS = [
    register_rows, every_other_label, stacked, scalars_as_tensors, wide_rows, coupled_rows, float16,
    scaled, own_losses, counted, augmented, buffers,
]  # fmt: skip
