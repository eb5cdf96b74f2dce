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


def test_slices_of_an_order(seen):
    assert seen(slices_of_an_order) == []


def test_slices_of_labels_and_weights(seen):
    assert seen(slices_of_labels_and_weights) == []


SCENARIOS = [slices_of_an_order, slices_of_labels_and_weights]
