"""Reductions of several peers' tensors at once, for the steps of `register_rows`.

A reduction costs barriers wherever what it adds up is spread over several warps, so tensors that
are known at the same time are reduced together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import joined, parted


@triton.jit
def reduce_group(T, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
                 OPERATION: tl.constexpr):  # fmt: skip
    """`reduced` for COUNT tensors from the place FIRST on, by one reduction. They are padded to
    SIZE, a power of two, by repetition; what becomes of the padding is not used."""
    OF = ()
    for i in tl.static_range(SIZE):
        if i < COUNT:
            OF = OF + (T[FIRST + i],)
        else:
            OF = OF + (T[FIRST],)
    if SIZE == 8:
        OF = joined(OF, 4)
    if SIZE >= 4:
        OF = joined(OF, 2)
    if SIZE >= 2:
        OF = joined(OF, 1)
    one = tl.reshape(OF[0], (T[0].shape[0], T[0].shape[1], SIZE))
    if OPERATION == "max":
        one = tl.max(one, axis=1)
    elif OPERATION == "min":
        one = tl.min(one, axis=1)
    else:
        one = tl.sum(one, axis=1)
    if SIZE == 8:
        ALL = parted(parted(parted((tl.reshape(one, (T[0].shape[0], 2, 2, 2)),), 1), 2), 4)
    elif SIZE == 4:
        ALL = parted(parted((tl.reshape(one, (T[0].shape[0], 2, 2)),), 1), 2)
    elif SIZE == 2:
        ALL = parted((one,), 1)
    else:
        ALL = (tl.reshape(one, (T[0].shape[0],)),)
    OUT = ()
    for i in tl.static_range(COUNT):
        OUT = OUT + (ALL[i],)
    return OUT


@triton.jit
def reduced(T, COUNT: tl.constexpr, OPERATION: tl.constexpr):
    """The "max", "min" or "sum" over the classes of each of COUNT tensors (ROWS, BLOCK_C), (ROWS,).

    Up to 8 share one reduction. Where there are several, all have one size: so every tensor is
    added up in the same order, and identical peers have identical sums."""
    SIZE: tl.constexpr = 8 if COUNT > 4 else (4 if COUNT > 2 else COUNT)
    OUT = ()
    for first in tl.static_range(0, COUNT, 8):
        OUT = OUT + reduce_group(
            T, first, 8 if COUNT - first > 8 else COUNT - first, SIZE, OPERATION
        )
    return OUT


@triton.jit
def row_totals(T, COUNT: tl.constexpr):
    """The sum of each of COUNT tensors (ROWS,), a scalar."""
    OUT = ()
    if T[0].shape[0] == 1:
        for i in tl.static_range(COUNT):
            OUT = OUT + (tl.sum(T[i], axis=0),)
    else:
        TRANSPOSED = ()
        for i in tl.static_range(COUNT):
            TRANSPOSED = TRANSPOSED + (tl.reshape(T[i], (1, T[0].shape[0])),)
        SUMS = ()
        for first in tl.static_range(0, COUNT, 8):
            SUMS = SUMS + reduce_group(
                TRANSPOSED, first, 8 if COUNT - first > 8 else COUNT - first,
                8 if COUNT - first > 4 else (4 if COUNT - first > 2 else COUNT - first), "sum",
            )  # fmt: skip
        for i in tl.static_range(COUNT):
            OUT = OUT + (tl.sum(SUMS[i], axis=0),)
    return OUT


@triton.jit
def selected(mask, T, COUNT: tl.constexpr):
    """Each of COUNT tensors (ROWS,) where `mask` is true, 0 elsewhere."""
    OUT = ()
    for i in tl.static_range(COUNT):
        OUT = OUT + (tl.where(mask, T[i], 0.0),)
    return OUT


@triton.jit
def weighed(T, W, COUNT: tl.constexpr):
    """Each of COUNT tensors (ROWS,) times the rows' weights, where W has them."""
    OUT = ()
    for i in tl.static_range(COUNT):
        if len(W) == 1:
            OUT = OUT + (T[i] * W[0],)
        else:
            OUT = OUT + (T[i],)
    return OUT
