"""The gradients of linear layers, added up over chunks of rows in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a product that is made in half precision before it is added, a block of classes at a time.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}


def new_grads(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    needs: Sequence[int],
) -> list[Tensor | None]:
    """Tensors for the gradients; at least float32 for those that are added up over chunks."""
    rows = [torch.empty_like(t) if need else None for t, need in zip(hidden, needs, strict=False)]
    sums = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
        if need and t is not None
        else None
        for t, need in zip((*weight, *bias), needs[len(hidden) :], strict=True)
    ]
    return rows + sums


def add_product(
    total: Tensor,  # (C, D), at least float32
    slope: Tensor,  # (n, C)
    hidden: Tensor,  # (n, D), in slope's dtype
) -> None:
    """total += slope^T hidden, with no other (C, D): that is as large as the layer's weight.

    Products of float16 and bfloat16 are added to a float32 total by cuBLAS (torch's `out_dtype`,
    which the CPU lacks; under ROCm it depends on the build). Elsewhere the product of a block of
    classes is rounded to their dtype, then added in float32."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.t(), hidden)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, slope.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        size = hidden.element_size() * max(hidden.shape[1], 1)
        step = max(1, BLOCK_BYTES[total.device.type] // size)
        for part, columns in zip(total.split(step), slope.split(step, dim=1), strict=True):
            part += columns.t() @ hidden
