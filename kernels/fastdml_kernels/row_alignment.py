"""Which matrices the code for aligned ones does for, whatever their own address.

Triton compiles a kernel for each combination of pointers that are multiples of 16 bytes and
pointers that are not. The rows of a stacked (K, N, C) tensor, or of a part of a batch, begin
anywhere, and in the capture of a CUDA graph another kernel is an error. But only what all rows have
in common helps the code: in a matrix that begins at a multiple of 16, rows of s bytes begin at
multiples of g = gcd(16, s), and no access is wider than that. A matrix that begins at another
multiple of g is as good: modulo 16 bytes, its row n begins where row n + m of an aligned matrix
does, for some m, and the code does for every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd
from operator import or_
from typing import Any

WIDEST = 16  # bytes a thread reads or writes at once


def as_aligned(address: int, strides: Sequence[int], itemsize: int) -> bool:
    """Whether the code for a matrix (N, C) at a multiple of 16 bytes does for one at this address.

    strides: elements from row to row and from column to column; itemsize: bytes of an element."""
    row, column = strides
    # Columns apart: the compiler may read along the rows instead, or not at all as said above.
    step = gcd(WIDEST, row * itemsize) if column == 1 else WIDEST
    return address % step == 0


def misaligned(addresses: Sequence[int], rows: Sequence[tuple[Any, Sequence[int]]]) -> Any:
    """False, or for which of the matrices it does not; rows: their dtypes and strides."""
    if reduce(or_, addresses, 0) % WIDEST == 0:
        return False
    each = [
        not as_aligned(address, strides, dtype.itemsize)
        for address, (dtype, strides) in zip(addresses, rows, strict=True)
    ]
    return any(each) and tuple(each)
