"""No kernel is compiled twice since a tensor begins elsewhere.

Triton compiles another kernel where a pointer is not aligned to 16 bytes; in the capture of a CUDA
graph that is an error. Its real compiler and launcher run on a stand-in for the driver
(`bench/stand_in`).
"""

from __future__ import annotations

import pytest
import torch
from fastdml_kernels.augment import augment
from fastdml_kernels.augment_options import Augment
from on_stand_in import scenarios_of

from fastdml import mutual_loss


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in_alignment")


def at(start: int, values: torch.Tensor) -> torch.Tensor:
    """The same values, `start` elements behind an aligned address."""
    memory = values.new_empty(start + values.numel())
    return memory[start:].view(values.shape).copy_(values)


def compiled(gpu, run) -> list[str]:
    """The kernels that are loaded at the second run and later ones."""
    run(0)
    before = len(gpu.kernels)
    for start in (1, 2, 3):
        run(start)
    return gpu.kernels[before:]


def slices_of_an_order(gpu):
    """Batches of an odd size: their indices are aligned to 16 bytes, or to 8."""
    images, labels = torch.zeros(20, 32, 32, 3, dtype=torch.uint8), torch.arange(20)
    mean, scale, order = torch.zeros(3), torch.ones(3), torch.randperm(20)
    what = Augment(32, 32, 4, True, True)

    def run(start: int) -> None:
        samples = order[5 * start : 5 * start + 5]
        augment(
            images, at(start, labels), samples, mean, scale, what, seed=1, epoch=1,
            repetitions=at(start, torch.zeros(5, dtype=torch.int64)), dtype=torch.float32,
        )  # fmt: skip

    return compiled(gpu, run)


def slices_of_labels_and_weights(gpu):
    """Of both regimes, with a backward, the labels counted by the kernel and before it."""
    new = []
    for N, C in ((8, 10), (5000, 10), (8, 40_000)):
        logits = [torch.randn(N, C).requires_grad_() for _ in range(2)]
        labels, numbers = torch.randint(C, (N,)), torch.ones(3)

        def run(start: int, logits=logits, labels=labels, numbers=numbers) -> None:
            temperature, ce_weight, kl_weight = (at(start, n) for n in numbers)
            losses = mutual_loss(
                logits, at(start, labels), temperature=temperature, ce_weight=ce_weight,
                kl_weight=kl_weight, peer_weights=at(start, torch.ones(2, 2)),
            )  # fmt: skip
            losses.backward(at(start, torch.full((2,), 2.0)))

        new += compiled(gpu, run)
    return new


def stacked(gpu):
    """Peers that begin one behind the other, and their gradients: batches of any size."""
    new = []
    for C, dtype in ((10, torch.bfloat16), (7, torch.float32), (101, torch.float16), (999, None)):
        for options in ({}, {"detach_targets": False}):

            def run(start: int, C=C, dtype=dtype, options=options) -> None:
                z = torch.randn(3, (64, 63, 1, 17)[start], C, dtype=dtype).requires_grad_()
                labels = torch.randint(C, (z.shape[1],))
                mutual_loss(z, labels, **options).backward(torch.full((3,), 2.0))

            new += compiled(gpu, run)
    return new


def wide_and_coupled(gpu):
    new = []
    for options in ({}, {"divergence": "jeffreys"}):

        def run(start: int, options=options) -> None:
            N = (4, 1, 3, 5)[start]
            z = torch.randn(2, N, 30_001).requires_grad_()
            mutual_loss(z, torch.randint(9, (N,)), **options).sum().backward()

        new += compiled(gpu, run)
    return new


def parts_of_a_batch(gpu):
    z = [torch.randn(50, 10, dtype=torch.bfloat16) for _ in range(2)]

    def run(start: int) -> None:
        part = slice(start, 50 - 5 * start)
        mutual_loss([x[part] for x in z], torch.randint(10, (50,))[part])

    return compiled(gpu, run)


def rows_anywhere(gpu):
    """Every row is aligned to 4 bytes and no more, wherever the first is."""

    def run(start: int) -> None:
        z = [at(start * k, torch.randn(8, 75)).requires_grad_() for k in (0, 1, 2)]
        mutual_loss(z, torch.randint(75, (8,))).backward(torch.full((3,), 2.0))

    return compiled(gpu, run)


def captured(gpu):
    """The batch of a capture begins elsewhere than those before."""
    z = torch.randn(3, 64, 14, dtype=torch.bfloat16).requires_grad_()
    mutual_loss(z, torch.randint(14, (64,))).backward(torch.full((3,), 2.0))
    before = len(gpu.kernels)
    with gpu.capture():
        z = torch.randn(3, 37, 14, dtype=torch.bfloat16).requires_grad_()
        mutual_loss(z, torch.randint(14, (37,))).backward(torch.full((3,), 2.0))
    return gpu.kernels[before:], [z.data_ptr() for z in z.unbind()]


def columns(gpu):
    """What is aligned like no row of an aligned matrix."""
    whole = torch.randn(2, 64, 128, dtype=torch.bfloat16)
    labels, used = torch.randint(100, (64,)), []
    for first in (0, 0, 8, 1, 2):
        gpu.clear()
        mutual_loss(list(whole[:, :, first : first + 100]), labels)
        used.append(gpu.launches()[0].function)
    return used


def test_stacked_peers_of_any_size(seen):
    assert seen(stacked) == []


def test_stacked_wide_rows_of_any_size(seen):
    assert seen(wide_and_coupled) == []


def test_parts_of_a_batch(seen):
    assert seen(parts_of_a_batch) == []


def test_rows_that_begin_anywhere(seen):
    assert seen(rows_anywhere) == []


def test_a_capture_of_another_alignment(seen):
    new, addresses = seen(captured)
    assert new == []
    assert any(address % 16 for address in addresses)


def test_columns_of_a_matrix_have_a_kernel_that_takes_nothing_for_granted(seen):
    aligned, again, next_vector, odd, even = seen(columns)
    assert aligned == again == next_vector
    assert odd != aligned
    assert even == odd


def test_slices_of_an_order(seen):
    assert seen(slices_of_an_order) == []


def test_slices_of_labels_and_weights(seen):
    assert seen(slices_of_labels_and_weights) == []


SCENARIOS = [
    stacked, wide_and_coupled, parts_of_a_batch, rows_anywhere, captured, columns,
    slices_of_an_order, slices_of_labels_and_weights,
]  # fmt: skip
