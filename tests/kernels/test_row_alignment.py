"""That code for aligned matrices does for those that `as_aligned` says it does for."""

from __future__ import annotations

from math import gcd

import pytest
from compiled import printed_by
from fastdml_kernels.row_alignment import as_aligned, misaligned
from torch import bfloat16, float32

WIDTHS = """
import json, re, sys, torch
from fastdml_kernels.options import Options
from fastdml_kernels.scale_grads import scale_rows
from fastdml_kernels.static_report import TARGETS, compile_kernel, report
for K, C, dtype, symmetric in json.loads(sys.argv[1]):
    seen = report(K, C, dtype, options=Options(symmetric=symmetric))
    print(json.dumps([seen.kernel, *map(int, seen.load_widths), *map(int, seen.store_widths)]))
for C in json.loads(sys.argv[2]):
    named = dict(grads=(torch.empty(8, C),), upstream=torch.ones(1), N=8, C=C, g_stride_k=1,
                 g_stride_n=0, K=1, STRIDES=(C,), BLOCK_N=4, BLOCK_C=1024)
    ptx = compile_kernel(scale_rows, named, {"num_warps": 4}, TARGETS["sm_90"]).asm["ptx"]
    wide = re.findall(r"(?:ld|st)[.]global\\S*?(?:[.]v(\\d))?[.]b(\\d+)", ptx)
    print(json.dumps(["scale_rows", *(int(n or 1) * int(bits) // 8 for n, bits in wide)]))
"""
# K, C, dtype and bytes of an element, symmetric, kernel
MATRICES = [
    (2, 10, "bf16", 2, False, "register_rows"),
    (2, 9002, "bf16", 2, False, "wide_rows"),
    (2, 9002, "fp32", 4, True, "coupled_rows"),
]
SCALED = [6]  # classes, in float32


def test_no_access_is_wider_than_what_all_rows_are_aligned_to():
    """On which `as_aligned` rests. Of logits and gradients the accesses are as wide as can be."""
    arguments = [(K, C, dtype, symmetric) for K, C, dtype, _, symmetric, _ in MATRICES]
    widths = printed_by(WIDTHS, arguments, SCALED)
    for (_, C, _, itemsize, _, kernel), (name, *seen) in zip(MATRICES, widths, strict=False):
        assert name == kernel
        assert max(seen) == gcd(16, C * itemsize), (kernel, C)
    for C, (_, *seen) in zip(SCALED, widths[len(MATRICES) :], strict=True):
        assert max(seen) <= gcd(16, C * 4), C


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("row", [*range(33), 100, 751, 1000])
def test_as_aligned_where_an_aligned_matrix_has_such_a_row(row, itemsize):
    starts = {m * row * itemsize % 16 for m in range(16)}
    for address in range(0, 64, itemsize):
        assert as_aligned(address, (row, 1), itemsize) == (address % 16 in starts)
        assert as_aligned(address, (row, 2), itemsize) == (address % 16 == 0)


def test_misaligned_names_the_matrices():
    rows = [(bfloat16, (10, 1)), (float32, (8, 1)), (bfloat16, (10, 2))]
    assert misaligned((0, 32, 48), rows) is False
    assert misaligned((4, 32, 48), rows) is False
    assert misaligned((2, 32, 48), rows) == (True, False, False)
    assert misaligned((0, 8, 4), rows) == (False, True, True)
