"""Combinations of options pass Triton's front end, which refuses what its interpreter lets by: a
name that is a tensor before a loop and a scalar within it, for example.

A process without the interpreter takes each combination as far as Triton's own intermediate code,
for NVIDIA and for AMD (of any two options for one of them, in turn), in a fraction of a second;
machine code is for `test_compile_targets`. The combinations are those of a covering array: any two
values of any two settings meet, and any three of those settings that decide what a gradient is made
of.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from compiled import printed_by
from covering import Covering

pytestmark = pytest.mark.skipif(
    torch.version.hip is not None, reason="compiles for NVIDIA's architectures too"
)

CODE = """
import gc, json, sys
from itertools import cycle, islice
import torch
from fastdml_kernels import augment, label_counts, scale_grads, static_report
from fastdml_kernels.augment_options import Augment
from fastdml_kernels.launch import arguments
from fastdml_kernels.tiles import choose, compiler_options
from oracle import DTYPES, make
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

class Passed(Exception):
    pass

def stop(*_, **__):
    raise Passed

CUDABackend.make_ttgir = HIPBackend.make_ttgir = stop  # the stage after the front end
gc.disable()  # a fifth of the time; what a combination leaves is some 4 MB

def dtypes(name, K):
    return list(islice(cycle(DTYPES), K)) if name == "mixed" else [getattr(torch, name)] * K

def scalar(value):
    return torch.tensor(0.7) if value == "tensor" else value

def loss(K, C, dtype, layout, label_dtype, gradient, stats, upstream, counted, regime, temperature,
         ce_weight, kl_weight, **settings):
    p = make(K, 4, C, dtype=dtypes(dtype, K), layout=layout,
             label_dtype=getattr(torch, label_dtype), **settings)
    own = torch.ones(K, 4) if upstream and p.options.reduction == "none" else None
    own = torch.ones(K) if upstream and own is None else own
    regime, tile = choose(K, C, p.options, gradient=gradient, stats=stats, upstream=own,
                          regime=regime)
    kernel, named, warps = arguments(
        p.logits, p.labels, p.options,
        grads=[torch.empty_like(z) if k in (p.options.students or range(K)) else None
               for k, z in enumerate(p.logits)] * gradient,
        want_stats=stats, upstream=own, regime=regime, tile=tile, temperature=scalar(temperature),
        ce_weight=scalar(ce_weight), kl_weight=scalar(kl_weight), **p.weights,
    )
    if counted:  # as where a batch is long
        named["counts"] = torch.empty(3)
    return kernel, named, lambda nvidia: compiler_options(warps, nvidia)

def scale(K, dtype, gap, rows):
    grads = [torch.empty(4, 10 + gap, dtype=d)[:, :10] for d in dtypes(dtype, K)]
    named = dict(
        grads=tuple(grads), upstream=torch.ones((K, 4) if rows else K), N=4, g_stride_k=1,
        g_stride_n=int(rows), **scale_grads.constants(10, tuple(g.stride(0) for g in grads)),
    )
    return scale_grads.scale_rows, named, lambda nvidia: {}

def count(C, label_dtype, class_weight, sample_weight):
    named = dict(
        labels=torch.zeros(4, dtype=getattr(torch, label_dtype)), counts=torch.empty(3), N=4,
        sample_weight=torch.ones(4) if sample_weight else None,
        class_weight=torch.ones(C) if class_weight else None, label_stride=1, ignore_index=-100,
        C=C,
    )
    return label_counts.count_labels, named, lambda nvidia: {"num_warps": 8}

def augmented(stored, channels, pad, reflect, flip, erase, cutout, dtype, epoch, repetitions):
    images, index = torch.empty(4, *stored, channels, dtype=torch.uint8), torch.zeros(4).long()
    kernel, named, options = augment.arguments(
        images, index, index, torch.zeros(channels), torch.ones(channels),
        Augment(32, 16, pad, reflect, flip, erase, cutout), seed=0,
        epoch=index[:1] if epoch == "tensor" else epoch,
        repetitions=index if repetitions else None, dtype=getattr(torch, dtype),
    )
    return kernel, named, lambda nvidia: options

for name, settings, archs in json.loads(sys.argv[1]):
    kernel, named, options = globals()[name](**settings)
    raised = {}
    for arch in archs:
        target = static_report.TARGETS[arch]
        try:
            static_report.compile_kernel(kernel, named, options(arch == "sm_90"), target)
        except Passed:
            pass
        except Exception as error:
            raised[arch] = str(error)[-400:]
    print(json.dumps([kernel.__name__, raised]))
"""

LOSS = {
    "gradient": (True, False), "stats": (False, True),
    "target": ("peers", "ensemble", "ensemble_logits"),
    "gate": ("none", "correct", "best", "confidence", "entropy"),
    "divergence": ("forward", "reverse", "jeffreys", "jsd"),
    "detach_targets": (True, False), "students": (None, "first", "others"),
    "sample_weight": (False, True),
    "label_smoothing": (0.0, 0.1), "mimic_ignored": (False, True),
    "reduction": ("mean", "sum", "none"), "temperature": (1.0, 2.5, "tensor"),
    "ce_weight": (0.7, "tensor"), "kl_weight": (0.7, "tensor"),
    "class_weight": (False, True), "peer_weights": (False, True),
    "upstream": (False, True), "counted": (False, True), "label_dtype": ("int64", "int32"),
    "dtype": ("float32", "bfloat16", "float16", "mixed"), "K": (1, 2, 3, 5, 8),
    "C": (1, 2, 100, 751, 1000, 3000, 32768),
    "layout": ("contiguous", "padded", "transposed", "expanded"), "regime": (None, "wide"),
}  # fmt: skip
NEVER = (  # the losses' own gradient, and labels that are counted beforehand, are for gradients
    (("upstream", True), ("gradient", False)), (("counted", True), ("gradient", False)),
    (("counted", True), ("reduction", "sum")), (("counted", True), ("reduction", "none")),
)  # fmt: skip
CORE = ("gradient", "stats", "target", "divergence", "detach_targets", "label_smoothing",
        "mimic_ignored", "reduction")  # fmt: skip
MANY_MIXTURES = tuple((("divergence", "jsd"), ("K", K)) for K in (5, 8))  # are not for registers
REGISTER = {  # what rows that are held in registers have
    "target": ("peers", "ensemble"), "detach_targets": (True,),
    "upstream": (False,), "regime": (None,), "C": (1, 2, 100, 751),
}  # fmt: skip
COUPLING = ("divergence", "detach_targets", "target")  # they change what a gradient is made of
SCALE = {
    "K": (1, 2, 3, 5, 8), "dtype": LOSS["dtype"], "gap": (0, 6), "rows": (False, True),
}  # fmt: skip
COUNT = {"C": LOSS["C"], "label_dtype": LOSS["label_dtype"], "class_weight": (False, True),
         "sample_weight": (False, True)}  # fmt: skip
AUGMENTED = {
    "stored": ((32, 16), (16, 8)), "channels": (1, 3), "pad": (0, 4), "reflect": (True, False),
    "flip": (False, True), "erase": (0.0, 0.5), "cutout": (0, 8),
    "dtype": ("float32", "bfloat16", "float16"), "epoch": (0, "tensor"),
    "repetitions": (False, True),
}  # fmt: skip


def combinations_of_options(strength: int = 2) -> list[dict[str, Any]]:
    """In which any so many values meet, and any of those that rows in registers have meet there.
    One peer has nothing to couple, and so meets each value once, in combinations that do not count
    for the others. So do the most peers, for whom the front end takes three times as long: two
    values that meet with fewer of them need not meet with them again."""
    alone, several, most = LOSS["K"][:1], LOSS["K"][1:-1], LOSS["K"][-1:]
    held = LOSS | REGISTER
    most_held = held | {"K": most, "divergence": LOSS["divergence"][:-1]}  # see MANY_MIXTURES
    arrays = [
        Covering(LOSS | {"K": several}, strength, core=CORE, never=NEVER),
        Covering(LOSS | {"K": alone}, strength - 1, never=NEVER),
        Covering(LOSS | {"K": most}, strength - 1, never=NEVER),
        Covering(held | {"K": several}, strength, never=(*NEVER, *MANY_MIXTURES)),
        Covering(most_held, strength - 1, never=NEVER),
    ]
    return [row for array in arrays for row in array.rows()]


AT_ONCE = 150  # combinations in one process, whose command line holds them
ARCHS = ("sm_90", "gfx942")


def through_the_front_end(
    cases: list[dict[str, Any]], kind: str = "loss", *, in_turn: bool = False
) -> list[str]:
    """The kernels that the cases take, none of which may raise. in_turn: for one of the two
    architectures each, which takes half of the time."""
    found = []
    archs = [ARCHS[i % 2 : i % 2 + 1] if in_turn else ARCHS for i in range(len(cases))]
    jobs = [(kind, case, own) for case, own in zip(cases, archs, strict=True)]
    for first in range(0, len(cases), AT_ONCE):
        found += printed_by(CODE, jobs[first : first + AT_ONCE])
    assert len(found) == len(cases)
    raised = [(*each, case) for each, case in zip(found, cases, strict=True) if each[1]]
    kinds = [set(case.items()) for *_, case in raised]
    alike = set.intersection(*kinds) if kinds else ()
    assert not raised, f"{len(raised)} of {len(cases)}, all of them with {alike}: {raised[:5]}"
    return [kernel for kernel, _ in found]


@pytest.fixture(scope="module")
def passed() -> list[tuple[dict[str, Any], str]]:
    """Combinations of the loss's options, and the kernels that took them."""
    cases = combinations_of_options()
    return list(zip(cases, through_the_front_end(cases, in_turn=True), strict=True))


def test_any_two_options_combine(passed):
    assert {kernel for _, kernel in passed} == {"register_rows", "wide_rows", "coupled_rows"}
    held = [case for case, kernel in passed if kernel == "register_rows"]
    space = LOSS | REGISTER
    for names in itertools.combinations(space, 2):
        excluded = [
            dict(pair) for pair in (*NEVER, *MANY_MIXTURES) if {n for n, _ in pair} == {*names}
        ]
        for values in itertools.product(*(space[n] for n in names)):
            pair = dict(zip(names, values, strict=True))
            if pair.get("K") != 1 and pair not in excluded:
                assert any(pair.items() <= case.items() for case in held), pair


def test_options_that_couple_the_peers_combine_with_every_other(passed):
    """Where there is a gradient, which they make the kernel another one for."""
    coupled = [case for case, kernel in passed if kernel == "coupled_rows" and case["gradient"]]
    for name, other in itertools.product(COUPLING, {*CORE} - {"gradient"}):
        if name != other:
            met = {case[other] for case in coupled if case[name] == LOSS[name][-1]}
            assert met == {*LOSS[other]}, (name, other)


def test_smoothing_with_gradients_that_hold_divergences_compiles():
    """Label smoothing keeps a number of each peer in one tensor, where otherwise it is a scalar."""
    all_of_it = {"divergence": "jsd", "detach_targets": False}
    settings = [{"divergence": "jsd"}, {"detach_targets": False},
                {**all_of_it, "target": "ensemble"},
                {**all_of_it, "target": "ensemble_logits"}]  # fmt: skip
    usual = {name: values[0] for name, values in LOSS.items()} | {"regime": "wide"}
    usual |= {"label_smoothing": 0.1, "class_weight": True, "stats": True, "K": 3, "C": 40}
    cases = [usual | each | {"upstream": not each.get("detach_targets", True)} for each in settings]
    assert set(through_the_front_end(cases)) == {"coupled_rows"}


@pytest.mark.parametrize(
    ("kind", "space"), [("scale", SCALE), ("count", COUNT), ("augmented", AUGMENTED)]
)
def test_any_two_options_of_the_other_kernels_combine(kind, space):
    through_the_front_end(Covering(space).rows(), kind, in_turn=True)


@pytest.mark.slow
def test_any_two_options_combine_for_both_architectures():
    through_the_front_end(combinations_of_options())


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "stats"), list(itertools.product([True, False], repeat=2)))
def test_every_pair_of_options_passes(gradient, stats):
    space = LOSS | {"gradient": (gradient,), "stats": (stats,)}
    if not gradient:
        space |= {"upstream": (False,), "counted": (False,)}
    through_the_front_end(Covering(space, never=NEVER).rows())


@pytest.mark.slow
def test_any_three_options_combine():
    through_the_front_end(combinations_of_options(3))


@pytest.mark.slow
def test_options_drawn_at_random_combine():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    covering = Covering(LOSS, never=NEVER, seed=seed)
    through_the_front_end([covering.random_row() for _ in range(100)])


# ---- the array


def together(rows: list[dict[str, Any]], names: tuple[str, ...]) -> set[tuple[Any, ...]]:
    return {tuple(row[name] for name in names) for row in rows}


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_values_that_can_occur_together_do(strength):
    """Against all combinations there are."""
    space = {"a": (1, 2, 3), "b": (1, 2), "c": ("x", "y"), "d": (False, True), "e": (0, 1, 2, 3)}
    never = ((("b", 2), ("d", True)), (("a", 3), ("d", True)))
    every = [dict(zip(space, each, strict=True)) for each in itertools.product(*space.values())]
    able = [r for r in every if not (r["d"] and (r["b"] == 2 or r["a"] == 3))]
    rows = Covering(space, strength, never=never).rows()
    assert all(row in able for row in rows)
    assert len(rows) < len(able)
    for names in itertools.combinations(space, strength):
        assert together(rows, names) == together(able, names)


def test_any_two_options_and_any_three_of_the_core_meet():
    rows = combinations_of_options()
    for names in (*itertools.combinations(LOSS, 2), *itertools.combinations(CORE, 3)):
        excluded = [dict(pair) for pair in NEVER if {n for n, _ in pair} <= {*names}]
        possible = [dict(zip(names, v, strict=True))
                    for v in itertools.product(*(LOSS[n] for n in names))]  # fmt: skip
        possible = [r for r in possible if not any(e.items() <= r.items() for e in excluded)]
        assert together(rows, names) == together(possible, names)


def test_what_is_drawn_at_random_keeps_values_apart_that_exclude_each_other():
    covering = Covering(LOSS, never=NEVER, seed=1)
    rows = [covering.random_row() for _ in range(200)]
    assert not any(dict(pair).items() <= row.items() for row in rows for pair in NEVER)
    assert together(rows, ("upstream",)) == together(rows, ("counted",)) == {(True,), (False,)}
