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
from fastdml_kernels.scale_grads import constants, scale_rows
from fastdml_kernels.static_report import DTYPES, TARGETS, compile_kernel, report
for K, C, dtype, divergence in json.loads(sys.argv[1]):
    seen = report(K, C, dtype, options=Options(divergence=divergence))
    print(json.dumps([seen.kernel, *map(int, seen.load_widths), *map(int, seen.store_widths)]))
for C, dtype in json.loads(sys.argv[2]):
    named = dict(grads=(torch.empty(8, C, dtype=DTYPES[dtype]),), upstream=torch.ones(1), N=8,
                 g_stride_k=1, g_stride_n=0, **constants(C, (C,)))
    ptx = compile_kernel(scale_rows, named, {"num_warps": 4}, TARGETS["sm_90"]).asm["ptx"]
    widths = {"ld": [], "st": []}
    for what, n, bits in re.findall(r"(ld|st)[.]global\\S*?(?:[.]v(\\d))?[.]b(\\d+)", ptx):
        widths[what].append(int(n or 1) * int(bits) // 8)
    print(json.dumps(widths))
"""
# K, C, dtype and bytes of an element, divergence, kernel
MATRICES = [
    (2, 10, "bf16", 2, "forward", "register_rows"),
    (2, 9002, "bf16", 2, "forward", "wide_rows"),
    (2, 9002, "fp32", 4, "jsd", "coupled_rows"),
]
# classes, dtype and bytes of an element
SCALED = [(6, "fp32", 4), (1000, "fp32", 4), (100, "bf16", 2), (1000, "bf16", 2), (751, "bf16", 2)]


def test_no_access_is_wider_than_what_all_rows_are_aligned_to():
    """On which `as_aligned` rests. Nor is any access to logits and gradients narrower."""
    arguments = [(K, C, dtype, divergence) for K, C, dtype, _, divergence, _ in MATRICES]
    widths = printed_by(WIDTHS, arguments, [(C, dtype) for C, dtype, _ in SCALED])
    for (_, C, _, itemsize, _, kernel), (name, *seen) in zip(MATRICES, widths, strict=False):
        assert name == kernel
        assert max(seen) == gcd(16, C * itemsize), (kernel, C)
    for (C, _, itemsize), seen in zip(SCALED, widths[len(MATRICES) :], strict=True):
        widest = gcd(16, C * itemsize)
        assert set(seen["st"]) == {widest}, C
        assert set(seen["ld"]) <= {widest, 4}, C  # 4: the losses' own gradient


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
