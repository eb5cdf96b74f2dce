"""The wide kernel: every option, forced at small C into several ragged blocks; long rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from covering import Covering
from fastdml_kernels.launch import _loads_vectors
from fastdml_kernels.tiles import Tile, fits_registers, lane, wide_tile
from hypothesis import given, settings
from oracle import (
    OPTIONS,
    Problem,
    assert_finite_on_the_verge_of_zero,
    check,
    launched,
    make,
    problems,
    upstream_of,
    wide,
)

OPTION_VALUES = [(name, value) for name, values in OPTIONS.items() for value in values]
AWAY = object()  # an option that is left out
COMBINATIONS = Covering(
    {name: (AWAY, *values) for name, values in OPTIONS.items()}
    | {"K": (2, 3), "C": (7, 8, 9), "results": ("all", "gradients", "statistics", "losses"),
       "dtype": (torch.float32, torch.bfloat16)},
).rows()  # fmt: skip


@pytest.mark.parametrize("row", range(len(COMBINATIONS)))
def test_every_pair_of_options_occurs(row):
    """With two and three peers, a last block of classes that is full or not, and all that may be
    asked for: blocks have four classes."""
    asked = {name: value for name, value in COMBINATIONS[row].items() if value is not AWAY}
    results = asked.pop("results")
    p = make(asked.pop("K"), 2, asked.pop("C"), ignored=0.2, seed=row, **asked)
    grad, stats = results in ("all", "gradients"), results in ("all", "statistics")
    check(p, wide, upstream=upstream_of(p), grad=grad, stats=stats, tile=Tile(1, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), OPTION_VALUES)
def test_each_option(name, value):
    p = make(3, 3, 7, ignored=0.2, **{name: value})
    check(p, wide, upstream=upstream_of(p))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"target": "ensemble", "detach_targets": False, "divergence": "jeffreys"},
    {"target": "ensemble_logits", "detach_targets": False, "divergence": "jsd", "temperature": 2.0},
    {"target": "peers", "detach_targets": False, "divergence": "jsd 0.2", "peer_weights": True},
    {"target": "ensemble_logits", "gate": "best", "peer_weights": True},
    {"detach_targets": False, "gate": "confidence", "reduction": "none"},
])  # fmt: skip
def test_options_that_share_a_pass(options):
    p = make(3, 3, 10, ignored=0.2, seed=1, **options)
    check(p, wide, upstream=upstream_of(p))


@pytest.mark.parametrize("target", ["peers", "ensemble", "ensemble_logits"])
@pytest.mark.parametrize(
    ("K", "divergence"), [(3, "reverse"), (2, "jeffreys"), (2, "jsd"), (3, "jsd 0.2")]
)
def test_identical_peers_have_no_divergence_at_all(K, divergence, target):
    p = make(1, 1, 10, target=target, divergence=divergence, spread=5.0, temperature=3.0,
             ce_weight=0.0)  # fmt: skip
    own = wide(Problem(p.logits * K, p.labels, p.options, p.weights), stats=K == 3)
    assert (own.losses == 0).all()
    assert all((g == 0).all() for g in own.grads)


@pytest.mark.parametrize("divergence", ["reverse", "jeffreys"])
def test_identical_peers_teach_their_mean_nothing(divergence):
    """Through the teachers' parts in it: differences come before quotients."""
    p = make(1, 2, 20, target="ensemble", divergence=divergence, detach_targets=False,
             ce_weight=0.0)  # fmt: skip
    own = wide(replace(p, logits=p.logits * 3), upstream=torch.tensor([1.0, -2.0, 0.3]))
    assert all((g == 0).all() for g in own.grads)


@pytest.mark.parametrize(
    ("N", "C", "temperature"),
    [pytest.param(8, 700, 1.0, marks=pytest.mark.slow), (6, 300, 3.0)],
)
def test_the_mean_of_identical_logits_has_their_normaliser_to_the_last_bit(N, C, temperature):
    """In tiles where a thread could sum several classes by itself."""
    p = make(1, N, C, spread=1.0, target="ensemble_logits", ce_weight=0.0,
             temperature=temperature)  # fmt: skip
    own = wide(replace(p, logits=p.logits * 2), stats=False, tile=Tile(1, 128, 1))
    assert (own.losses == 0).all()
    assert all((g == 0).all() for g in own.grads)


@pytest.mark.parametrize("gate", ["confidence", "entropy"])
def test_a_soft_gate_changes_nothing_for_a_student_with_one_teacher(gate):
    without, gated = make(2, 3, 9), make(2, 3, 9, gate=gate)
    one, two = wide(without), wide(gated)
    assert torch.equal(one.losses, two.losses)
    assert all(map(torch.equal, one.grads, two.grads))


def test_teachers_who_all_but_rule_the_label_out_are_weighed_by_their_ratio():
    """Both probabilities are 0 in float32."""
    p = make(3, 4, 9, gate="confidence", divergence="jsd")
    for z, low in zip(p.logits, (-200.0, -201.0, -203.0), strict=True):
        z[torch.arange(4), p.labels] = low
    own = check(p, wide, yardsticks=False)
    assert own.losses.isfinite().all()


@pytest.mark.parametrize("divergence", ["jsd", "jsd 0.2"])
def test_the_jensen_shannon_divergence_is_finite_where_supports_differ(divergence):
    p = make(2, 2, 9, divergence=divergence, ce_weight=0.0)
    p.logits[0][:, :4] = -torch.inf
    p.logits[1][:, 6:] = -torch.inf
    own = check(p, wide, yardsticks=False, grad=False, stats=False)
    assert own.losses.isfinite().all()
    assert all(g.isfinite().all() for g in wide(p).grads)


@pytest.mark.parametrize("options", [{}, {"gate": "entropy", "divergence": "jsd"}], ids=str)
def test_a_row_of_weight_zero_may_hold_anything(options):
    p = make(3, 4, 9, sample_weight=True, mimic_ignored=True, **options)
    p.weights["sample_weight"] = torch.tensor([0.5, 0.0, 2.0, 0.0])
    for z in p.logits:
        z[1] = torch.nan
        z[3, 2] = torch.inf
    p.labels[3] = 99
    own, few = wide(p), Problem([z[::2] for z in p.logits], p.labels[::2], p.options,
                                {"sample_weight": torch.tensor([0.5, 2.0])})  # fmt: skip
    alone = wide(few)
    assert torch.equal(own.losses, alone.losses)
    for g, want in zip(own.grads, alone.grads, strict=True):
        assert torch.equal(g[::2], want)
        assert (g[1::2] == 0).all()
    assert all(torch.equal(own.stats[name], alone.stats[name]) for name in own.stats)


@pytest.mark.parametrize("options", [
    {}, {"reduction": "none", "temperature": 2.0}, {"target": "ensemble_logits"},
    {"gate": "correct", "label_smoothing": 0.1, "class_weight": True},
])  # fmt: skip
def test_float16_gradients_are_scaled_before_they_are_rounded(options):
    """By the losses' own gradient, such as a loss scale, whether teachers are constants or not."""
    p = make(3, 3, 10, ignored=0.2, dtype=torch.float16, **options)
    shape = (3, 3) if p.options.reduction == "none" else (3,)
    check(p, wide, upstream=torch.linspace(-1, 3, 3 ** len(shape)).view(shape))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jeffreys"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("teacher", [-80.0, -86.9, -97.0])
def test_a_mixed_teacher_on_the_verge_of_zero(teacher, detach, divergence):
    assert_finite_on_the_verge_of_zero(wide, 3, teacher, detach_targets=detach,
                                       divergence=divergence)  # fmt: skip


@given(problems(most_peers=3, most_rows=4, most_classes=40, most_logits=60, options=OPTIONS))
@settings(max_examples=15, deadline=None)
def test_any_shape_layout_dtype_and_three_options(drawn):
    p, upstream = drawn
    check(p, wide, upstream=upstream)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(OPTIONS, 2)])
def test_every_pair_of_options(one, other):
    for values in itertools.product(OPTIONS[one], OPTIONS[other]):
        p = make(3, 4, 10, ignored=0.2, **dict(zip((one, other), values, strict=True)))
        check(p, wide, upstream=upstream_of(p))


@pytest.mark.slow
@given(problems(most_peers=5, most_rows=9, most_logits=5000, options=OPTIONS))
@settings(max_examples=60, deadline=None)
def test_any_shape_layout_dtype_and_three_options_at_length(drawn):
    p, upstream = drawn
    check(p, wide, upstream=upstream)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("block_c", [4, 8, 16])
def test_blocks_and_programs(block_c, programs):
    """C = 11: several blocks with a ragged last one, or one block larger than the row."""
    check(make(2, 5, 11, ignored=0.3), wide, tile=Tile(1, block_c, 4), max_programs=programs)


@pytest.mark.parametrize("grad", [False, True])
def test_the_maximum_grows_from_block_to_block(grad):
    """Running sums are rescaled each time; early blocks shrink to nothing."""
    p = make(2, 2, 16)
    for z in p.logits:
        z += torch.arange(16) * 20.0
    check(p, wide, tile=Tile(1, 4, 4), grad=grad, stats=grad)
    for z in p.logits:
        z -= torch.arange(16) * 40.0
    check(p, wide, tile=Tile(1, 4, 4), grad=grad, stats=grad)


@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
@pytest.mark.parametrize("options", [
    {}, {"class_weight": True, "label_smoothing": 0.1, "temperature": 2.0}, {"gate": "correct"},
    {"target": "ensemble", "gate": "best"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_that_sum_several_classes_by_themselves(dtype, options, layout):
    """Lanes of two and four classes, side by side where rows are aligned and apart where not; the
    maximum is in another lane of another block for every peer, and ties are in several."""
    C = 208 if layout == "contiguous" else 203
    p = make(3, 4, C, dtype=dtype, ignored=0.2, **options)
    assert all(_loads_vectors(z) == (layout == "contiguous") for z in p.logits)
    for k, z in enumerate(p.logits):
        z[0, [70 + k, 131, 190 - 61 * k]] = 25.0
        z[1, ::3] = float("-inf")
        z[2] = 0.5
    for block_c in (64, 128):
        tile = Tile(1, block_c, 1)
        assert lane(tile, p.logits) < block_c
        check(p, wide, tile=tile)
        check(p, wide, tile=tile, stats=False)


@pytest.mark.parametrize(("K", "C"), [(2, 9000), (1, 20_001)])
def test_long_rows(K, C):
    check(make(K, 2, C, dtype=torch.bfloat16), launched)


@pytest.mark.parametrize("K", range(1, 17))
def test_any_number_of_peers_has_a_tile(K):
    assert all(wide_tile(K, 262_144, pairs).block_c >= 128 for pairs in (False, True))
    assert wide_tile(K, 3, False).block_c == 4


def test_options_beyond_the_register_kernel_go_wide():
    for changes in ({"detach_targets": False}, {"target": "ensemble_logits"}):
        p = make(2, 2, 5, **changes)
        assert not fits_registers(2, 5, p.options, None)
        check(p, launched, upstream=upstream_of(p))
