"""The register kernel: sizes and layouts, every tile, rows that outnumber the programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from fastdml_kernels.launch import COUNT_IN_KERNEL
from fastdml_kernels.register_functions import load_block
from fastdml_kernels.tiles import Tile, most_logits, register_tile, table
from hypothesis import assume, given, settings
from oracle import (
    DEVICE,
    IN_REGISTERS,
    REGISTER_OPTIONS,
    assert_finite_on_the_verge_of_zero,
    check,
    launched,
    make,
    one_row,
    problems,
    reference,
    register,
)


@given(problems(most_peers=4, most_rows=130, most_logits=4000, options=REGISTER_OPTIONS))
@settings(max_examples=25, deadline=None)
def test_any_shape_layout_dtype_and_three_options(drawn):
    p, _ = drawn
    K, _, C = p.shape
    assume(register_tile(K, C) is not None)  # 3 peers of more than 2,048 classes have none
    check(p, register)


@pytest.mark.slow
@given(problems(most_rows=130, most_logits=60_000, options=REGISTER_OPTIONS))
@settings(max_examples=150, deadline=None)
def test_any_shape_layout_dtype_and_three_options_at_length(drawn):
    p, _ = drawn
    K, _, C = p.shape
    assume(register_tile(K, C) is not None)
    check(p, register)


@pytest.mark.parametrize("options", [{"gate": "best"}, {"target": "ensemble", "gate": "correct"},
                                     {"peer_weights": True, "temperature": 3.0},
                                     {"label_smoothing": 0.2, "class_weight": True},
                                     {"mimic_ignored": True, "reduction": "sum"}])  # fmt: skip
def test_options(options):
    check(make(3, 24, 10, ignored=0.3, **options), register)


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("K", [3, 5, 6, 7, 9])
def test_peers_of_any_number_share_their_reductions(K, path):
    """Up to eight tensors a reduction: one and two reductions, full and padded."""
    check(make(K, 3, 12, ignored=0.2), path)
    check(make(K, 2, 12, temperature=2.0, gate="correct", label_smoothing=0.1), path)


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("K", [3, 5, 9])
def test_identical_peers_have_no_divergence(K, temperature, path):
    p = make(1, 2, 12, spread=5.0)
    p = replace(p, logits=list(p.logits) * K, weights={"temperature": temperature})
    answer = check(p, path)
    assert (answer.stats["kl"] == 0).all()
    assert (answer.stats["pairwise_kl"] == 0).all()
    assert all(torch.equal(g, answer.grads[0]) for g in answer.grads)


RULED_OUT = {"first": [0], "last": [-1], "all_but_first": slice(1, None), "all": slice(None)}


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("who", RULED_OUT)
@pytest.mark.parametrize("K", [2, 3, 5])
def test_a_class_that_some_peers_rule_out(K, who, temperature, path):
    """Products that are 0 * inf: the row is computed again. All other rows are not."""
    p = make(K, 4, 9, temperature=temperature, reduction="none")
    p.labels[2] = 0
    stacked = torch.stack(list(p.logits))
    stacked[RULED_OUT[who], 2, 6] = -torch.inf
    answer = check(replace(p, logits=list(stacked)), path)
    assert not answer.losses.isnan().any()
    assert answer.losses.isinf().any() == (who != "all")


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("low", [-40.0, -1e4, -1e9])
@pytest.mark.parametrize("far", [0, -1])
@pytest.mark.parametrize("K", [3, 5])
def test_peers_near_each_other_and_one_far_from_them(K, far, low, path):
    """What one peer all but rules out costs it more than the others lose by it: the large
    divergence leaves the digits of the small ones."""
    near = make(1, 6, 9, spread=1.0).logits[0]
    p = make(K, 6, 9, reduction="none", ce_weight=0.0)
    p = replace(p, logits=[near + 0.1 * z for z in p.logits])
    p.logits[far][:, 2] = low
    exact = reference(p).losses
    torch.testing.assert_close(path(p).cpu().losses.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("path", IN_REGISTERS)
@pytest.mark.parametrize("options", [{}, {"mimic_ignored": True}, {"kl_weight": 0.0}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("K", [2, 3])
def test_rows_that_are_broken_unlabelled_or_both(K, value, options, path):
    """One row breaks in one peer, one in the first, with and without a label."""
    p = make(K, 6, 5, reduction="none", **options)
    p.labels[2:4] = p.options.ignore_index
    for peer, row in ((0, 1), (0, 2), (K - 1, 3), (K - 1, 4)):
        p.logits[peer][row] = value
    answer, exact = path(p).cpu(), reference(p)
    fine = [0, 5]
    ignored = [2, 3]
    assert answer.losses[:, fine].isfinite().all()
    assert torch.equal(answer.losses.isnan(), exact.losses.isnan())
    if not options.get("mimic_ignored"):
        assert (answer.losses[:, ignored] == 0).all()
        assert all((g[ignored] == 0).all() for g in answer.grads)
    for g, want in zip(answer.grads, exact.grads, strict=True):
        assert torch.equal(g[fine].isnan(), want[fine].isnan())


def test_probabilities_that_are_zero_without_infinite_logits():
    """0 * a finite number: no row is computed again, and none is NaN."""
    p = make(3, 6, 9)
    for k, z in enumerate(p.logits):
        z[:, k] += 300.0
    check(p, one_row)


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("teacher", [-80.0, -86.9, -97.0])
@pytest.mark.parametrize("path", IN_REGISTERS)
def test_a_mixed_teacher_on_the_verge_of_zero(path, teacher, K):
    """The first peer is sure of a class to which its teachers give exp(teacher) / 1023: about the
    smallest normal float32, below which some numbers are 0 and others not."""
    assert_finite_on_the_verge_of_zero(path, K, teacher)


@pytest.mark.parametrize(("K", "C"), [(8, 100), (2, 751), (4, 1000), (2, 2048), (1, 2100)])
def test_sizes_of_real_data(K, C):
    check(make(K, 4, C, dtype=torch.bfloat16, ignored=0.2), register)


def test_many_classes_that_are_alike():
    """Log-probabilities are far larger than logits. The interpreter adds up one class after the
    other where a GPU adds pairs, so that their roundings show."""
    check(make(4, 2, 2000, dtype=torch.float16, spread=0.1, seed=10), register)


@pytest.mark.parametrize(
    "limit", [e.logits[1] for e in table()["default"] if e.kernel == "register"]
)
@pytest.mark.parametrize("K", [1, 2])
def test_each_tile_of_the_table(K, limit):
    """With its own number of rows, at the largest C that it takes, less one: a ragged row."""
    C = limit // K - 1
    assert register_tile(K, C).block_c == limit // K
    check(make(K, 5, C, spread=2.0), launched)


def test_rows_too_wide_for_registers_have_no_tile():
    last = most_logits()
    assert register_tile(1, last) is not None
    assert register_tile(1, last + 1) is None
    assert register_tile(2, last) is None


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_walk_over_their_rows(rows, programs):
    """More row blocks than programs, the last block ragged."""
    check(make(2, 13, 10, ignored=0.3), register, tile=Tile(rows, 16, 4), max_programs=programs)


def test_the_number_of_programs_moves_no_gradient_and_hardly_a_loss():
    """A loss is a sum in a fixed order, but in another one for another number of programs."""
    p = make(3, 24, 10, ignored=0.2)
    one, many = (register(p, tile=Tile(2, 16, 4), max_programs=n) for n in (1, 5))
    assert all(torch.equal(a, b) for a, b in zip(one.grads, many.grads, strict=True))
    torch.testing.assert_close(one.losses, many.losses, rtol=1e-6, atol=0)
    assert torch.equal(one.stats["correct"], many.stats["correct"])


@pytest.mark.parametrize("class_weight", [False, True])
def test_long_batches_count_their_labels_beforehand(class_weight):
    check(make(2, COUNT_IN_KERNEL + 3, 3, ignored=0.3, class_weight=class_weight), register)


def test_registers_asked_for_where_they_do_not_do_are_refused():
    """By name: no tile of None, and no option that is left out in silence."""
    too_wide, coupled = make(2, 3, 8192), make(2, 3, 10, target="ensemble_logits")
    with pytest.raises(ValueError, match=r"K = 2 peers and C = 8192 classes"):
        register(too_wide)
    with pytest.raises(ValueError, match="ensemble_logits"):
        register(coupled)
    with pytest.raises(ValueError, match="upstream"):
        register(make(2, 3, 10), upstream=torch.ones(2, device=DEVICE))
    assert launched(too_wide).losses.isfinite().all()


@triton.jit
def labels_of_a_block(logits, labels, out, block, N, ROWS: tl.constexpr, STRIDES: tl.constexpr,
                      READABLE: tl.constexpr):  # fmt: skip
    y, _, _ = load_block(logits, labels, 0, None, -100, block, N, tl.arange(0, 2), ROWS, 1, 2,
                         STRIDES, READABLE)  # fmt: skip
    tl.store(out + tl.arange(0, ROWS), y)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_block_after_the_last_of_2_to_the_31_rows_is_not_read(rows):
    """All rows are one in memory, so that one that is read all the same shows and harms nobody."""
    logits = torch.zeros(1, 2, device=DEVICE)
    labels, out = torch.ones(1, dtype=torch.int64, device=DEVICE), torch.empty(rows, device=DEVICE)
    for block, expected in ((2**31 // rows - 2, 1.0), (2**31 // rows - 1 + 3, -100.0)):
        # a tensor, since numbers are Python's, without an end, in the interpreter
        at = torch.tensor(block % 2**32 - 2**32 * (block >= 2**31), dtype=torch.int32)
        out.zero_()
        labels_of_a_block[(1,)](
            (logits,), labels, out, int(at), 2**31 - 1, ROWS=rows, STRIDES=((0, 1, 0),),
            READABLE=(2,),
        )  # fmt: skip
        assert out.tolist() == [expected] * rows
