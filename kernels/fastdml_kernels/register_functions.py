"""Steps of `register_rows`, which holds the rows of all peers in registers.

Tuples in capitals have one tensor a peer: (ROWS, BLOCK_C) with a number for each class, or (ROWS,)
with one for each row. A reduction over the classes costs barriers wherever a row is spread over
several warps, so tensors that are known at the same time are reduced together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import joined, parted


@triton.jit
def load_rows(logits, n64, inside, cols,
              K: tl.constexpr, STRIDES: tl.constexpr, READABLE: tl.constexpr):  # fmt: skip
    """The rows n64 of all peers, in their own dtypes. Nothing stands between the loads, so that all
    are on their way together."""
    ROWS = ()
    for k in tl.static_range(K):
        row = tl.load(logits[k] + n64[:, None] * STRIDES[k][0] + cols[None, :] * STRIDES[k][1],
                      mask=inside[:, None] & (cols < READABLE[k])[None, :], other=0.0,
                      eviction_policy="evict_first")  # fmt: skip
        ROWS = ROWS + (row,)
    return ROWS


@triton.jit
def store_row(grad, g, n64, inside, cols, stride: tl.constexpr, C: tl.constexpr):
    """Writes one peer's gradient rows."""
    tl.store(grad + n64[:, None] * stride + cols[None, :], g.to(grad.dtype.element_ty),
             mask=inside[:, None] & (cols < C)[None, :], eviction_policy="evict_first")  # fmt: skip


# ---- reductions over the classes


@triton.jit
def reduce_group(T, FIRST: tl.constexpr, COUNT: tl.constexpr, OPERATION: tl.constexpr):
    """`reduced` for COUNT tensors from the place FIRST on, by one reduction. They are padded to a
    power of two by repetition; what becomes of the padding is not used."""
    SIZE: tl.constexpr = 8 if COUNT > 4 else (4 if COUNT > 2 else COUNT)
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
        OUT = parted(parted(parted((tl.reshape(one, (T[0].shape[0], 2, 2, 2)),), 1), 2), 4)
    elif SIZE == 4:
        OUT = parted(parted((tl.reshape(one, (T[0].shape[0], 2, 2)),), 1), 2)
    elif SIZE == 2:
        OUT = parted((one,), 1)
    else:
        OUT = (tl.reshape(one, (T[0].shape[0],)),)
    return OUT


@triton.jit
def reduced(T, COUNT: tl.constexpr, OPERATION: tl.constexpr):
    """The "max", "min" or "sum" over the classes of each of COUNT tensors (ROWS, BLOCK_C), (ROWS,).
    Up to 8 share one reduction."""
    OUT = ()
    for first in tl.static_range(0, COUNT, 8):
        OUT = OUT + reduce_group(T, first, 8 if COUNT - first > 8 else COUNT - first, OPERATION)
    return OUT
