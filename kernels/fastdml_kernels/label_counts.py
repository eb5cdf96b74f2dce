"""Counts the labelled rows in one launch, for batches too long for every program to count."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import count_rows
from .launch_plan import Planned


@triton.jit(
    do_not_specialize=["N", "label_stride", "ignore_index"],
    do_not_specialize_on_alignment=["labels", "class_weight", "sample_weight"],
)
def count_labels(labels, class_weight, sample_weight, counts, N, label_stride, ignore_index,
                 C: tl.constexpr):  # fmt: skip
    """Grid: (1,). counts[0]: sum of the labelled rows' class weights, counts[1]: labelled rows;
    with `sample_weight` counts[2]: all rows, and in each a row of weight w counts w times."""
    weight, rows, all_rows = count_rows(labels, label_stride, class_weight, sample_weight, N,
                                        ignore_index, C)  # fmt: skip
    tl.store(counts, weight)
    tl.store(counts + 1, rows)
    if sample_weight is not None:
        tl.store(counts + 2, all_rows)


_count_labels = Planned(
    count_labels, "labels", "class_weight", "sample_weight", "counts", "N", "label_stride",
    "ignore_index",
)  # fmt: skip


def label_counts(
    labels: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    C: int,
) -> Tensor:
    """(2,) float32 on the labels' device: the sum of the class weights of the labels that are not
    ignore_index, and the number of these labels. With `sample_weight` (N,) (3,), the number of all
    rows last, and in each number a row of weight w counts w times."""
    counts = torch.empty(2 if sample_weight is None else 3, device=labels.device,
                         dtype=torch.float32)  # fmt: skip
    values = (
        labels, class_weight, sample_weight, counts, labels.numel(), labels.stride(0), ignore_index,
    )  # fmt: skip
    _count_labels((1, 1, 1), values, C, lambda: {"C": C}, num_warps=8)
    return counts
