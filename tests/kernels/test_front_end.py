"""Pairs of options pass Triton's front end, which refuses what its interpreter lets by: a name that
is a tensor before a loop and a scalar within it, for example.

A process without the interpreter takes each pair as far as Triton's own intermediate code for
sm_90, in a fraction of a second; machine code is for `test_compile_targets`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from compiled import printed_by
from oracle import OPTIONS

CODE = """
import json, sys
import torch
from fastdml_kernels import static_report
from fastdml_kernels.launch import arguments
from fastdml_kernels.tiles import choose, compiler_options
from oracle import make, upstream_of
from triton.backends.nvidia.compiler import CUDABackend

class Passed(Exception):
    pass

def stop(*_, **__):
    raise Passed

CUDABackend.make_ttgir = stop  # the stage after the front end
for options, gradient, stats, K in json.loads(sys.argv[1]):
    p = make(K, 4, 40, dtype=torch.bfloat16, **options)
    grads = list(p.logits) if gradient else []
    upstream = upstream_of(p) if gradient else None
    regime, tile = choose(K, 40, p.options, gradient=gradient, stats=stats, upstream=upstream,
                          regime="wide")
    kernel, named, warps = arguments(
        p.logits, p.labels, p.options, grads=grads, want_stats=stats, regime=regime, tile=tile,
        upstream=upstream, **p.weights,
    )
    try:
        static_report.compile_kernel(
            kernel, named, compiler_options(warps, nvidia=True), static_report.TARGETS["sm_90"]
        )
    except Passed:
        pass
    except Exception as error:
        print(json.dumps([options, gradient, stats, K, str(error)[-400:]]))
        continue
    print(json.dumps(kernel.__name__))
"""
COUPLING = ("symmetric", "detach_targets", "target")  # they change what a gradient is made of


def through_the_front_end(cases: list[tuple]) -> set[str]:
    """The kernels that the cases (options, gradient, stats, K) take, none of which may raise."""
    found = printed_by(CODE, cases)
    assert len(found) == len(cases)
    raised = [each for each in found if not isinstance(each, str)]
    assert not raised, raised
    return set(found)


def pairs(names: tuple[str, ...], values_of: dict[str, tuple]) -> list[dict]:
    """Every pair of options of which one is among `names`, away from their defaults."""
    return [
        dict(zip(pair, values, strict=True))
        for pair in itertools.combinations(values_of, 2)
        if not set(pair).isdisjoint(names)
        for values in itertools.product(*(values_of[name] for name in pair))
    ]


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA's architectures")
def test_options_that_couple_the_peers_combine_with_every_other():
    first = {name: values[:1] for name, values in OPTIONS.items()}
    cases = [(options, True, False, 2) for options in pairs(COUPLING, first)]
    assert through_the_front_end(cases) == {"wide_rows", "coupled_rows"}


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "stats"), list(itertools.product([True, False], repeat=2)))
def test_every_pair_of_options_passes(gradient, stats):
    cases = [(options, gradient, stats, 3) for options in pairs(tuple(OPTIONS), OPTIONS)]
    through_the_front_end(cases)


def test_smoothing_with_gradients_that_hold_divergences_compiles():
    """Label smoothing keeps a number of each peer in one tensor, where otherwise it is a scalar."""
    all_of_it = {"symmetric": True, "detach_targets": False}
    settings = [{"symmetric": True}, {"detach_targets": False}, {**all_of_it, "target": "ensemble"},
                {**all_of_it, "target": "ensemble_logits"}]  # fmt: skip
    smoothed = {"label_smoothing": 0.1, "class_weight": True}
    cases = [({**each, **smoothed}, True, True, 3) for each in settings]
    assert through_the_front_end(cases) == {"coupled_rows"}
