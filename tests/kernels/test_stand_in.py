"""What the host hands to the CUDA driver: each argument of each kernel is the right one.

Each scenario takes two turns, with other tensors, rows and numbers: what a first launch keeps for
the next must not be what changes.

Triton's real compiler and launcher run on a stand-in for the driver (`bench/stand_in`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
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
_kept: list[torch.Tensor] = []  # so that no two have the same address


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in")


def peers(K: int, N: int, C: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """K logits (N, C) that want gradients."""
    return [torch.randn(N, C).to(dtype).requires_grad_() for _ in range(K)]


def labels_of(N: int, C: int) -> torch.Tensor:
    return torch.randint(C, (N,))


def address(tensor: torch.Tensor) -> int:
    _kept.append(tensor)
    return tensor.data_ptr()


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [address(t) for t in tensors]


def compared(launch: Any, kernel: str, **wanted: Any) -> dict[str, Any]:
    """The kernel's name and arguments, as they were and as they should have been."""
    values = {"kernel": launch.kernel, **launch.arguments}
    return {"got": {name: values[name] for name in ("kernel", *wanted)},
            "wanted": {"kernel": kernel, **wanted}}  # fmt: skip


def call_of(labels: torch.Tensor, options: Options, **changed: Any) -> Call:
    plain = Call(labels, options, 1.0, 1.0, 1.0, None, None, None, want_stats=True)
    return plain._replace(**changed)


def both_turns(scenario: Callable) -> Callable:
    @wraps(scenario)
    def turns(gpu: Any) -> list[Any]:
        cases = []
        for turn in range(2):
            gpu.clear()
            found = scenario(gpu, turn)
            cases += found if isinstance(found, list) else [found]
        return cases

    return turns


def hold(cases: list[dict[str, Any]]) -> None:
    assert cases
    for case in cases:
        assert case["got"] == case["wanted"]


# ---- register rows


def register_rows(gpu, turn):
    """Every kind of argument at once: views with strides, labels of 32 bits, weights."""
    N, T, ce, kl, ignored = 50 + turn, 3.0 + turn, 0.5 + turn, 2.0 + turn, 7 + turn
    wide = torch.randn(3, N + 1, 80)
    logits = [w[1:, 4:74] for w in wide.unbind()]
    labels = torch.randint(70, (2, N), dtype=torch.int32).t()[:, 0]
    class_weight, peer_weights = torch.rand(70), torch.rand(3, 3)
    call = call_of(
        labels, Options(ignore_index=ignored), temperature=T, ce_weight=ce, kl_weight=kl,
        class_weight=class_weight, peer_weights=peer_weights,
    )  # fmt: skip
    losses, stats, grads = losses_and_grads(logits, call, range(len(logits)))
    (launch,) = gpu.launches()
    return compared(
        launch, "register_rows",
        logits=addresses(logits), grads=addresses(grads), labels=address(labels),
        peer_weights=address(peer_weights), class_weight=address(class_weight),
        losses=address(losses), stats=address(stats),
        N=N, label_stride=1, ignore_index=ignored, ce_weight=ce, kl_weight=kl, temperature=T,
        label_smoothing=0.0, K=3, C=70, STRIDES=[[80, 1, 70]] * 3, NEED_GRAD=True, STATS=True,
    )  # fmt: skip


def test_register_rows(seen):
    hold(seen(register_rows))


def every_other_label(gpu, turn):
    N = 30 + turn
    logits, labels = peers(2, N, 70), labels_of(2 * N, 70)[::2]
    with torch.no_grad():
        losses = mutual_loss(logits, labels)
    (launch,) = gpu.launches()
    return compared(
        launch, "register_rows", logits=addresses(logits), grads=[], labels=address(labels),
        losses=address(losses), N=N, label_stride=2, NEED_GRAD=False,
    )  # fmt: skip


def test_labels_of_a_view_without_gradient(seen):
    hold(seen(every_other_label))


def stacked(gpu, turn):
    N = 20 + 2 * turn
    logits, labels = torch.randn(3, N, 70, requires_grad=True), labels_of(N, 70)
    losses = mutual_loss(logits, labels)
    losses.sum().backward()
    loss, scale = gpu.launches()
    parts = addresses(logits.grad.unbind())
    return [
        compared(loss, "register_rows", logits=addresses(logits.unbind()), grads=parts, N=N),
        compared(scale, "scale_rows", grads=parts, N=N, C=70, STRIDES=[70] * 3),
    ]


def test_stacked_logits(seen):
    hold(seen(stacked))


def scalars_as_tensors(gpu, turn):
    scalars = {n: torch.ones(()) for n in ("temperature", "ce_weight", "kl_weight")}
    N = 10 + turn
    mutual_loss(peers(2, N, 70), labels_of(N, 70), **scalars)
    (launch,) = gpu.launches()
    flags = {"CE_POINTER": True, "KL_POINTER": True, "T_POINTER": True, "TEMPERED": True}
    pointers = {name: address(value) for name, value in scalars.items()}
    return compared(launch, "register_rows", **pointers, **flags, N=N)


def test_scalars_in_tensors_are_pointers(seen):
    hold(seen(scalars_as_tensors))


# ---- wide and coupled rows, and those whose loss has an upstream gradient


def wide_rows(gpu, turn):
    N, smoothing, kl = 6 + turn, 0.25 + turn / 2, 0.5 + turn
    logits, labels = peers(2, N, 9000, torch.bfloat16), labels_of(N, 9000)
    call = call_of(labels, Options(label_smoothing=smoothing), kl_weight=kl)
    losses, stats, grads = losses_and_grads([z.detach() for z in logits], call, range(len(logits)))
    (launch,) = gpu.launches()
    return compared(
        launch, "wide_rows", logits=addresses(logits), grads=addresses(grads),
        labels=address(labels), losses=address(losses), stats=address(stats),
        upstream=None, N=N, label_stride=1, ce_weight=1.0, kl_weight=kl, temperature=1.0,
        label_smoothing=smoothing, K=2, C=9000, STRIDES=[[9000, 1, 9000]] * 2, NEED_GRAD=True,
    )  # fmt: skip


def test_wide_rows(seen):
    hold(seen(wide_rows))


def coupled_rows(gpu, turn):
    """Gradients that flow into the teachers come from the backward, with the losses' own."""
    N = 6 + turn
    logits, labels = peers(2, N, 70), labels_of(N, 70)
    upstream = torch.rand(N, 2).t()
    losses = mutual_loss(logits, labels, detach_targets=False, reduction="none")
    losses.backward(upstream)
    forward, backward = gpu.launches()
    common = {"logits": addresses(logits), "labels": address(labels), "N": N, "K": 2, "C": 70}
    return [
        compared(forward, "wide_rows", **common, losses=address(losses), grads=[]),
        compared(
            backward, "coupled_rows", **common, grads=addresses([z.grad for z in logits]),
            upstream=address(upstream), u_stride_k=1, u_stride_n=2, REDUCTION="none",
            DETACH=False, DIVERGENCE="forward",
        ),
    ]  # fmt: skip


def test_coupled_rows(seen):
    hold(seen(coupled_rows))


def float16(gpu, turn):
    N = 8 + turn
    logits, labels = peers(2, N, 70, torch.float16), labels_of(N, 70)
    upstream = torch.full((2,), 1024.0)
    mutual_loss(logits, labels).backward(upstream)
    forward, backward = gpu.launches()
    return [
        compared(forward, "register_rows", logits=addresses(logits), grads=[]),
        compared(
            backward, "wide_rows", logits=addresses(logits), upstream=address(upstream), N=N,
            grads=addresses([z.grad for z in logits]), u_stride_k=1, u_stride_n=0,
        ),
    ]  # fmt: skip


def test_float16(seen):
    hold(seen(float16))


# ---- scale_rows, count_labels, augment


def scaled(gpu, turn):
    cases, N = [], 40 + turn
    for reduction, upstream, strides in (
        ("mean", torch.rand(()).expand(3), [0, 0]),
        ("mean", torch.rand(6)[::2], [2, 0]),
        ("none", torch.rand(N, 3).t(), [1, 3]),
    ):
        logits = peers(3, N, 70)
        mutual_loss(logits, labels_of(N, 70), reduction=reduction).backward(upstream)
        *_, launch = gpu.launches()
        wanted = {"grads": addresses([z.grad for z in logits]), "upstream": address(upstream)}
        strides_wanted = dict(zip(("g_stride_k", "g_stride_n"), strides, strict=True))
        cases.append(compared(launch, "scale_rows", **wanted, **strides_wanted, N=N, C=70))
    return cases


def test_scale_rows(seen):
    hold(seen(scaled))


def own_losses(gpu, turn):
    N = 12 + turn
    logits, labels = peers(3, N, 70), labels_of(N, 70)
    losses = mutual_losses(logits, labels)
    for loss in losses:
        loss.backward()
    first, *scales = gpu.launches()
    cases = [compared(first, "register_rows", logits=addresses(logits), N=N)]
    for z, scale in zip(logits, scales, strict=True):
        wanted = {"grads": [address(z.grad)], "N": N, "C": 70, "STUDENTS": [0]}
        cases.append(compared(scale, "scale_rows", **wanted))
    return cases


def test_each_own_loss_scales_its_peers_gradient(seen):
    cases = seen(own_losses)
    assert len(cases) == 2 * 4
    hold(cases)


def counted(gpu, turn):
    N, ignored = 5000 + turn, 3 + turn
    logits, labels, class_weight = peers(2, N, 10), labels_of(N, 10), torch.rand(10)
    mutual_loss(logits, labels, class_weight=class_weight, ignore_index=ignored)
    count, loss = gpu.launches()
    counts = count.arguments["counts"]
    return [
        compared(
            count, "count_labels", labels=address(labels), class_weight=address(class_weight),
            N=N, label_stride=1, ignore_index=ignored, C=10,
        ),
        compared(loss, "register_rows", counts=counts, logits=addresses(logits), N=N),
        {"got": count.grid, "wanted": [1, 1, 1]},
    ]  # fmt: skip


def test_labels_of_a_long_batch_are_counted_first(seen):
    hold(seen(counted))


def augmented(gpu, turn):
    images, labels = torch.zeros(50, 8, 8, 3, dtype=torch.uint8), labels_of(50, 10)
    B, seed = 20 + turn, 3 + turn
    samples, repetitions = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    mean, scale, what = torch.rand(3), torch.rand(3), Augment(8, 8, pad=2, flip=True)
    cases = []
    for epoch in (5 + turn, torch.tensor([5])):
        gpu.clear()
        out, out_labels = augment(
            images, labels, samples, mean, scale, what, seed=seed, epoch=epoch,
            repetitions=repetitions,
        )  # fmt: skip
        (launch,) = gpu.launches()
        tensors = {
            "images": images, "labels": labels, "samples": samples, "repetitions": repetitions,
            "mean": mean, "scale": scale, "out": out, "out_labels": out_labels,
        }  # fmt: skip
        pointers = {name: address(tensor) for name, tensor in tensors.items()}
        value = epoch if isinstance(epoch, int) else address(epoch)
        numbers = {"seed": seed, "epoch": value, "H": 8, "W": 8, "PAD": 2, "FLIP": True}
        cases.append(compared(launch, "augment_batch", **pointers, **numbers, shapes=None))
        cases.append({"got": launch.grid[0], "wanted": B})
    return cases


def test_augment(seen):
    hold(seen(augmented))


# ---- memory that a launch works in


def buffers(gpu):
    """The bytes that a launch writes, (first, end) of each buffer, for several calls."""
    kept, found = [], []
    shapes = [
        (Options(), 2, 64, 100),
        (Options(reduction="none"), 3, 33, 50),
        (Options(), 8, 16, 20),
        (Options(), 2, 9, 9000),
        (replace(Options(), divergence="jeffreys"), 3, 9, 40),
    ]
    for options, K, N, C in shapes * 2:
        logits, labels = [torch.randn(N, C) for _ in range(K)], labels_of(N, C)
        kept.append(losses_and_grads(logits, call_of(labels, options), range(len(logits))))
        launch = gpu.launches()[-1]
        size, programs, a = stats_layout(K).size, launch.grid[0], launch.arguments
        lengths = {
            "losses": K * N if options.reduction == "none" else K,
            "stats": size, "partials": programs * size, "counter": 1,
            "scratch": programs * 3 * K * K,
        }  # fmt: skip
        spans = {n: [a[n], a[n] + FLOAT * k] for n, k in lengths.items() if a.get(n)}
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
    *map(both_turns, (
        register_rows, every_other_label, stacked, scalars_as_tensors, wide_rows, coupled_rows,
        float16, scaled, own_losses, counted, augmented,
    )),
    buffers,
]  # fmt: skip
