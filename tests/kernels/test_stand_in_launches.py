"""How often the host launches, and what makes Triton compile another kernel.

On a GPU a compilation takes seconds in the middle of training, and within a capture it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastdml_kernels.augment import augment
from fastdml_kernels.augment_options import Augment
from on_stand_in import launched, loaded, scenarios_of

from fastdml import MutualLoss, mutual_loss, mutual_losses

WIDE = 9000  # classes, more than registers hold


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in_launches")


def peers(K: int, N: int, C: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """K logits (N, C) that want gradients."""
    return [torch.randn(N, C).to(dtype).requires_grad_() for _ in range(K)]


def labels_of(N: int, C: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(C, (N,), dtype=dtype)


def train(logits: Any, labels: torch.Tensor, **options: Any) -> None:
    mutual_loss(logits, labels, **options).sum().backward()


# ---- number of launches


def launches(gpu):
    logits, labels = peers(3, 20, 70), labels_of(20, 70)
    halves = peers(2, 20, 70, torch.float16)
    long, many = peers(2, 5000, 10), labels_of(5000, 10)
    direct = MutualLoss()

    def without_gradient():
        with torch.no_grad():
            mutual_loss(logits, labels)

    def each_own():
        for loss in mutual_losses(logits, labels):
            loss.backward()

    def twice():
        loss = mutual_loss(logits, labels).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    calls = {
        "without gradient": without_gradient,
        "forward": lambda: mutual_loss(logits, labels),
        "statistics": lambda: mutual_loss(logits, labels, return_stats=True),
        "training": lambda: train(logits, labels),
        "two backward passes": twice,
        "gradients at once": lambda: direct.value_and_grad(logits, labels),
        "own losses": each_own,
        "float16": lambda: train(halves, labels),
        "long batch": lambda: train(long, many),
        "empty batch": lambda: train(peers(2, 0, 70), labels_of(0, 70)),
    }
    return {name: launched(gpu, call) for name, call in calls.items()}


def test_number_of_launches(seen):
    assert seen(launches) == {
        "without gradient": ["register_rows"],
        "forward": ["register_rows"],
        "statistics": ["register_rows"],
        "training": ["register_rows", "scale_rows"],
        "two backward passes": ["register_rows", "scale_rows", "register_rows", "scale_rows"],
        "gradients at once": ["register_rows"],
        "own losses": ["register_rows", "scale_rows", "scale_rows", "scale_rows"],
        "float16": ["register_rows", "wide_rows"],
        "long batch": ["count_labels", "register_rows", "scale_rows"],
        "empty batch": ["register_rows"],
    }


def grids(gpu):
    """Programs of the first launch for several numbers of rows, and for many."""
    found = []
    for N in (1, 5, 64, 100_000):
        gpu.clear()
        mutual_loss(peers(2, N, 3), labels_of(N, 3))
        found.append(gpu.launches()[-1].grid)
    return found


def test_no_more_programs_than_the_device_holds(seen):
    *few, many = seen(grids)
    assert all(grid[1:] == [1, 1] for grid in (*few, many))
    assert few[0][0] == 1
    assert [grid[0] for grid in few] == sorted(grid[0] for grid in few)
    assert 132 <= many[0] <= 32 * 132  # an H100's multiprocessors, and blocks of each


# ---- compilations


def batch_sizes(gpu):
    sizes = (64, 63, 1, 7, 128, 4096, 4097, 9000, 5001, 64)
    return loaded(
        gpu, (lambda N=N: train(peers(2, N, 73), labels_of(N, 73)) for N in sizes)
    )  # fmt: skip


def test_a_batch_of_another_size_compiles_nothing(seen):
    first, *more = seen(batch_sizes)
    assert first == ["register_rows", "scale_rows"]
    at = 5  # the first batch so long that its labels are counted apart
    assert more[at] == ["count_labels", "register_rows"]
    assert not any(more[:at] + more[at + 1 :]), more


def wide_batch_sizes(gpu):
    return loaded(
        gpu, (lambda N=N: train(peers(2, N, WIDE), labels_of(N, WIDE)) for N in (2, 1, 5, 16))
    )


def test_a_batch_of_another_size_compiles_nothing_in_wide_rows(seen):
    assert seen(wide_batch_sizes) == [["wide_rows", "scale_rows"], [], [], []]


def captured(gpu):
    logits, labels = peers(2, 16, 77), labels_of(16, 77)

    def in_capture() -> None:
        with gpu.capture():
            train(logits, labels)

    def elsewhere(stream: int, call: Callable[[], Any]) -> None:
        with gpu.on_stream(stream):
            call()

    def plain() -> None:
        train(logits, labels)

    calls = [
        plain,
        *[in_capture] * 3,
        lambda: elsewhere(7, plain),
        lambda: elsewhere(8, in_capture),
    ]
    return loaded(gpu, calls)


def test_a_capture_compiles_nothing_and_runs_on_its_stream(seen):
    assert seen(captured) == [["register_rows", "scale_rows"], *[[]] * 5]


def streams(gpu):
    logits, labels = peers(2, 16, 78), labels_of(16, 78)
    train(logits, labels)
    gpu.clear()
    with gpu.on_stream(7):
        train(logits, labels)
    mutual_loss(logits, labels)
    return [launch.stream for launch in gpu.launches()]


def test_launches_are_on_the_current_stream(seen):
    assert seen(streams) == [7, 7, 0]


def scalars(gpu):
    logits, labels = peers(2, 16, 79), labels_of(16, 79)

    def call(**values: Any) -> Callable[[], Any]:
        return lambda: mutual_loss(logits, labels, **values)

    def tensor(**values: float) -> Callable[[], Any]:
        return call(**{name: torch.tensor(value) for name, value in values.items()})

    return {
        "numbers": loaded(gpu, [
            call(temperature=2.0, ce_weight=0.5), call(temperature=3.5, kl_weight=0.0),
            call(temperature=4, ce_weight=1, kl_weight=3), call(temperature=2.0, ignore_index=1),
        ]),
        "tensors": loaded(gpu, [
            tensor(kl_weight=0.5), tensor(kl_weight=0.0), tensor(kl_weight=1.0),
            call(kl_weight=torch.ones(()), ignore_index=16),
        ]),
        "smoothing": loaded(gpu, [call(label_smoothing=0.1), call(label_smoothing=0.25)]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["numbers", "tensors", "smoothing"])
def test_another_value_compiles_nothing(seen, kind):
    first, *more = seen(scalars)[kind]
    assert first == ["register_rows"]
    assert not any(more), more


def kinds_of_calls(gpu):
    logits, labels = peers(2, 16, 80), labels_of(16, 80)
    columns = [torch.randn(80, 16).t().requires_grad_() for _ in range(2)]
    calls = {
        "first": lambda: mutual_loss(logits, labels),
        "labels of 32 bits": lambda: mutual_loss(logits, labels.int()),
        "half precision": lambda: mutual_loss(peers(2, 16, 80, torch.bfloat16), labels),
        "one of two": lambda: mutual_loss([logits[0], logits[1].bfloat16()], labels),
        "columns": lambda: mutual_loss(columns, labels),
        "weight in a tensor": lambda: mutual_loss(logits, labels, ce_weight=torch.ones(())),
        "temperature": lambda: mutual_loss(logits, labels, temperature=2.0),
        "statistics": lambda: mutual_loss(logits, labels, return_stats=True),
        "three peers": lambda: mutual_loss(peers(3, 16, 80), labels),
    }
    return dict(zip(calls, loaded(gpu, [*calls.values()] * 2), strict=False)), loaded(
        gpu, calls.values()
    )


def test_each_kind_of_call_has_its_own_kernel_once(seen):
    first, again = seen(kinds_of_calls)
    assert all(kernels == ["register_rows"] for kernels in first.values()), first
    assert not any(again), again


def augmentation(gpu):
    images, labels = torch.zeros(50, 8, 8, 3, dtype=torch.uint8), labels_of(50, 10)
    mean, scale, what = torch.rand(3), torch.rand(3), Augment(8, 8, pad=2, flip=True)

    def batch(B: int, first: int, seed: int, epoch: int) -> None:
        samples = torch.arange(50)[first : first + B]
        augment(images, labels, samples, mean, scale, what, seed=seed, epoch=epoch)

    batches = ((16, 0, 0, 0), (15, 16, 0, 1), (1, 2, 16, 16), (0, 0, 1, 1), (16, 32, 2**31 - 1, 1))
    return loaded(gpu, (lambda b=b: batch(*b) for b in batches))


def test_another_epoch_or_batch_of_augmentation_compiles_nothing(seen):
    assert seen(augmentation) == [["augment_batch"], *[[]] * 4]


SCENARIOS = [
    launches, grids, batch_sizes, wide_batch_sizes, captured, streams, scalars,
    kinds_of_calls, augmentation,
]  # fmt: skip
