"""Backward of the loss: multiplies the stored gradients by the losses' own gradient, in place.

Where that gradient is 1, as after `loss.sum().backward()`, a program reads it and leaves at once:
no gradient is read or written, and the host never waits to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch_plan import Planned

MOST_BLOCK_C = 1024  # classes at a time


@triton.jit(
    do_not_specialize=["N", "g_stride_k", "g_stride_n"],
    do_not_specialize_on_alignment=["upstream"],
)
def scale_rows(
    grads,  # pointers (N, C) of the peers STUDENTS, rows STRIDES[i] apart
    upstream,  # (K,) or (K, N), any strides
    N, g_stride_k, g_stride_n,
    STUDENTS: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks,); each program scales its rows of every student. C is constant, so that
    the compiler knows where a row ends, and up to there moves 16 bytes a thread where rows allow
    it."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    for i in tl.static_range(len(STUDENTS)):
        g = tl.load(upstream + STUDENTS[i] * g_stride_k + n * g_stride_n, mask=inside, other=1.0)
        g = g.to(tl.float32)
        if tl.max(tl.where(g == 1.0, 0, 1), axis=0) == 1:
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                at = grads[i] + n[:, None] * STRIDES[i] + c[None, :]
                mask = inside[:, None] & (c < C)[None, :]
                x = tl.load(at, mask=mask).to(tl.float32) * g[:, None]
                tl.store(at, x.to(grads[i].dtype.element_ty), mask=mask)


def scale_(grads: Sequence[Tensor | None], upstream: Tensor) -> None:
    """grads[k] (N, C) *= upstream[k], (K,) or (K, N), in place; None for a peer that has no
    gradient. No host synchronisation on CUDA."""
    if upstream.device.type == "cpu":
        if upstream.dim() == 1:
            for grad, g in zip(grads, upstream.tolist(), strict=True):
                if grad is not None and g != 1:
                    grad.mul_(g)
        elif not bool((upstream == 1).all()):
            for grad, g in zip(grads, upstream.unbind(), strict=True):
                if grad is not None:
                    grad.mul_(g[:, None])
        return
    launch_scale(grads, upstream)


_scale_rows = Planned(scale_rows, "grads", "upstream", "N", "g_stride_k", "g_stride_n")


def _rows(C: int) -> int:
    """Rows a program: as many as give each of its threads something to do."""
    return max(4, MOST_BLOCK_C >> (C - 1).bit_length())


def constants(
    C: int, strides: tuple[int, ...], students: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The kernel's constants for gradients of C classes, whose rows are `strides` apart. students:
    their peers; None: all, in order."""
    return dict(
        STUDENTS=tuple(range(len(strides))) if students is None else students, C=C,
        STRIDES=strides, BLOCK_N=_rows(C), BLOCK_C=min(MOST_BLOCK_C, triton.next_power_of_2(C)),
    )  # fmt: skip


def launch_scale(grads: Sequence[Tensor | None], upstream: Tensor) -> None:
    learning = tuple([g for g in grads if g is not None])
    if not learning or learning[0].shape[0] == 0:
        return
    N, C = learning[0].shape
    students = None
    if len(learning) < len(grads):
        students = tuple(k for k, g in enumerate(grads) if g is not None)
    strides = tuple([g.stride(0) for g in learning])
    u_strides = upstream.stride()
    _scale_rows(
        (triton.cdiv(N, _rows(C)), 1, 1),
        (learning, upstream, N, u_strides[0], u_strides[1] if len(u_strides) == 2 else 0),
        (C, strides, students),
        lambda: constants(C, strides, students),
    )
