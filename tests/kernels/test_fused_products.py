"""A logit over the temperature is multiplied and added in one rounding, written out as such.

A compiler may fuse a product and the sum that it goes into, and did so for one peer and not for
another: identical peers then had divergences other than 0. Triton's intermediate code is read,
before anything is fused: each peer has the same number of written-out fusions, and no other product
with 1 / T goes into a sum. So is what LLVM has made of it for each architecture, with common
expressions shared and loops unrolled: there too nothing is left that its code generator, or ptxas
behind it, could fuse for one peer alone.
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
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

class Read(Exception):
    pass

def read(module, *_, **__):
    raise Read(str(module))

stages = json.loads(sys.argv[1])  # those after the code that is wanted
for backend, name in zip((CUDABackend, HIPBackend), stages):
    made = vars(backend)[name]  # a method takes the backend first, a static one the code
    setattr(backend, name, staticmethod(read) if isinstance(made, staticmethod)
            else lambda self, *code: read(*code))
for arch, regime, K, C, options in json.loads(sys.argv[2]):
    p = make(K, 8, C, temperature=2.0, **options)
    regime, tile = choose(K, C, p.options, gradient=True, stats=True, upstream=None,
                          regime=regime)
    kernel, named, warps = arguments(
        p.logits, p.labels, p.options, grads=list(p.logits), want_stats=True, regime=regime,
        tile=tile, **p.weights,
    )
    try:
        static_report.compile_kernel(
            kernel, named, compiler_options(warps, nvidia=arch.startswith("sm")),
            static_report.TARGETS[arch],
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
WEIGHED = {"target": "ensemble", "peer_weights": True}
DIVERGENCES = [
    ("register", 2, 100, {"divergence": "jsd"}),
    ("register", 3, 100, WEIGHED | {"divergence": "reverse"}),
    ("wide", 2, 100, {"target": "ensemble_logits"}),
    ("wide", 3, 100, WEIGHED),
]
SAME_VALUE = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.negf")


@pytest.fixture(scope="module")
def code() -> list[str]:
    """Triton's intermediate code of each case, made in one process."""
    return printed_by(CODE, ["make_ttgir"] * 2, [("sm_90", *case) for case in CASES + DIVERGENCES])


def instructions(text: str) -> list[tuple[str, str, str]]:
    """Result, operation and operands."""
    instruction = re.compile(r"(%\w+) = \"?([\w.]+)\"? ?(.*?)(?: : |$)")
    return [m.group(1, 2, 3) for m in map(instruction.search, text.splitlines()) if m]


def products(text: str) -> tuple[int, list[str]]:
    """How many fused products there are with 1 / T, and the sums that take an unfused one."""
    parsed = instructions(text)
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


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA's architectures")
@pytest.mark.parametrize(
    "case", range(len(DIVERGENCES)), ids=lambda i: "-".join(map(str, DIVERGENCES[i]))
)
def test_the_divergences_of_identical_peers_start_from_equal_numbers(code, case):
    """Every other product that they contain then has a factor of 0, fused or not. A quotient of
    equal numbers need not be 1 on a GPU: none has its logarithm taken."""
    text, (_, K, *_) = code[len(CASES) + case], DIVERGENCES[case]
    fused, sums = products(text)
    assert sums == []
    assert fused >= 2 * K
    assert fused % K == 0
    quotients: set[str] = set()
    for name, op, operands in instructions(text):
        taken = quotients.intersection(re.findall(r"%\w+", operands))
        if op == "arith.divf" or (op in SAME_VALUE and taken):
            quotients.add(name)
        assert not (op == "math.log" and taken), operands


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA's architectures")
@pytest.mark.parametrize(
    "case",
    [i for i, (regime, *_) in enumerate(CASES + DIVERGENCES) if regime == "register"],
    ids=lambda i: "-".join(map(str, (CASES + DIVERGENCES)[i])),
)
def test_probabilities_are_rounded_before_their_differences(code, case):
    """Gradients are made of differences of e^z / sum: with one of the two products unrounded in a
    fused one, those of identical peers are not 0. No such product is left to a compiler."""
    text, (_, K, *_) = code[case], (CASES + DIVERGENCES)[case]
    parsed = instructions(text)
    inverse = {name for name, op, _ in parsed if op == "arith.divf" and name.startswith("%Q")}
    assert len(inverse) == K
    rounded = 0
    for name, op, operands in parsed:
        taken = inverse.intersection(re.findall(r"%\w+", operands))
        if op in (*SAME_VALUE, "ttg.convert_layout") and taken:
            inverse.add(name)
        rounded += op == "math.fma" and bool(taken)
        assert not (op == "arith.mulf" and taken), operands
    assert rounded == K


OPTIMISED = [
    *((arch, "register", 2, 751, {}) for arch in ("sm_90", "sm_100", "gfx942")),
    *((arch, "register", 4, 100, {}) for arch in ("sm_90", "gfx942")),
    *((arch, "wide", 2, 100, {}) for arch in ("sm_90", "gfx942")),
]
KEEPS = {"fneg", "insertelement", "shufflevector", "extractelement", "phi", "select", "freeze"}


@pytest.fixture(scope="module")
def optimised() -> list[str]:
    """LLVM's code of each case, as its code generators get it."""
    return printed_by(CODE, ["make_ptx", "make_amdgcn"], OPTIMISED)


def llvm_products(text: str) -> tuple[int, list[str]]:
    """As `products`."""
    signature = next(line for line in text.splitlines() if line.startswith("define"))
    temperature = re.findall(r"float (?:\w+ )*(%\w+)", signature)[2]  # after the terms' weights
    instruction = re.compile(r"(%[\w.]+) = (?:tail )?(\w+) (.*)")
    parsed = [m.groups() for m in map(instruction.search, text.splitlines()) if m]
    quotient = re.compile(rf"1\.0+e\+00, (?:float )?{temperature}\b")
    inverse = {name for name, _, operands in parsed if quotient.search(operands)}
    assert len(inverse) == 1
    unfused: set[str] = set()
    fused, sums = 0, []
    for name, op, operands in parsed:
        taken = re.findall(r"%[\w.]+", operands)
        negated = op == "fsub" and re.match(r"[^%]*\b(0\.0+e\+00|zeroinitializer),", operands)
        if op in KEEPS or negated:
            for known in (inverse, unfused):
                if known.intersection(taken):
                    known.add(name)
        elif op == "fmul" and inverse.intersection(taken):
            unfused.add(name)
        elif op == "call" and "fma" in operands:
            fused += bool(inverse.intersection(taken))
        elif op in ("fadd", "fsub") and unfused.intersection(taken):
            sums.append(f"{name} = {op} {operands}")
    return fused, sums


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA's architectures")
@pytest.mark.parametrize(
    "case", range(len(OPTIMISED)), ids=lambda i: "-".join(map(str, OPTIMISED[i][:4]))
)
def test_no_product_with_the_temperature_is_left_for_a_code_generator_to_fuse(optimised, case):
    fused, sums = llvm_products(optimised[case])
    assert sums == []
    assert fused >= OPTIMISED[case][2]
