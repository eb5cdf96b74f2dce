"""A logit over the temperature is multiplied and added in one rounding, written out as such.

A compiler may fuse a product and the sum that it goes into, and did so for one peer and not for
another: identical peers then had divergences other than 0. Here Triton's intermediate code is read,
before anything is fused: each peer has the same number of written-out fusions, and no other product
with 1 / T goes into a sum.
"""

from __future__ import annotations

import re

import pytest
import torch
from compiled import printed_by

CODE = """
import json, sys
from fastdml_kernels import static_report
from fastdml_kernels.launch import arguments
from fastdml_kernels.tiles import choose, compiler_options
from oracle import make
from triton.backends.nvidia.compiler import CUDABackend

class Read(Exception):
    pass

def read(module, *_, **__):
    raise Read(str(module))

CUDABackend.make_ttgir = staticmethod(read)  # the stage after Triton's own code
for regime, K, C, options in json.loads(sys.argv[1]):
    p = make(K, 8, C, temperature=2.0, **options)
    regime, tile = choose(K, C, p.options, gradient=True, stats=True, upstream=None,
                          regime=regime)
    kernel, named, warps = arguments(
        p.logits, p.labels, p.options, grads=list(p.logits), want_stats=True, regime=regime,
        tile=tile, **p.weights,
    )
    try:
        static_report.compile_kernel(
            kernel, named, compiler_options(warps, nvidia=True), static_report.TARGETS["sm_90"]
        )
    except Read as found:
        print(json.dumps(str(found)))
"""
CASES = [
    *(("register", K, 100, {}) for K in (2, 3, 4)),
    ("register", 3, 100, {"gate": "best", "label_smoothing": 0.1}),
    *(("register", K, 1000, {}) for K in (3, 4)),
    *(("wide", K, 100, {}) for K in (2, 3)),
    ("wide", 2, 100, {"target": "ensemble"}),
]
SAME_VALUE = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.negf")


@pytest.fixture(scope="module")
def code() -> list[str]:
    """Triton's intermediate code of each case, made in one process."""
    return printed_by(CODE, CASES)


def products(text: str) -> tuple[int, list[str]]:
    """How many fused products there are with 1 / T, and the sums that take an unfused one."""
    instruction = re.compile(r"(%\w+) = \"?([\w.]+)\"? ?(.*?)(?: : |$)")
    parsed = [m.groups() for m in map(instruction.search, text.splitlines()) if m]
    # 1 / T is the quotient that the source calls so; its copies in other shapes are it as well.
    inverse = {name for name, op, _ in parsed if op == "arith.divf" and "inv_t" in name}
    assert len(inverse) == 1
    zero = {name for name, op, what in parsed if op == "arith.constant" and "0.000000e+00" in what}
    unfused: set[str] = set()
    fused, sums = 0, []
    for name, op, operands in parsed:
        taken = re.findall(r"%\w+", operands)
        # 0 - x, as older versions write -x, is one rounding, fused or not.
        if op in SAME_VALUE or (op == "arith.subf" and taken[0] in zero):
            for known in (inverse, unfused):
                if known.intersection(taken):
                    known.add(name)
        elif op == "arith.mulf" and inverse.intersection(taken):
            unfused.add(name)
        elif op == "math.fma":
            fused += bool(inverse.intersection(taken))
        elif op in ("arith.addf", "arith.subf") and unfused.intersection(taken):
            sums.append(f"{name} = {op} {operands}")
    return fused, sums


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA's architectures")
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_every_peer_has_the_same_fused_products(code, case):
    """Three in registers: the exponent, its normaliser and the log-probability; in wide rows, whose
    exponents are differences times 1 / T, the last two. Tiles of one row have the divergences in
    two ways: the shorter one starts from each peer's log-probability less that of the first."""
    regime, K, C, _ = CASES[case]
    each = {"register": 3, "wide": 2}[regime] * K
    assert products(code[case]) == (each + (K - 1 if C == 1000 else 0), [])
