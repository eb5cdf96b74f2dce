"""The register kernel: sizes and layouts, every tile, rows that outnumber the programs."""

from __future__ import annotations

import pytest
import torch
from fastdml_kernels.launch import COUNT_IN_KERNEL
from fastdml_kernels.tiles import Tile, most_logits, register_tile, table
from hypothesis import assume, given, settings
from oracle import DEVICE, REGISTER_OPTIONS, check, launched, make, problems, register


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


@pytest.mark.parametrize(("K", "C"), [(8, 100), (2, 751), (4, 1000), (2, 2048), (1, 2100)])
def test_sizes_of_real_data(K, C):
    check(make(K, 4, C, dtype=torch.bfloat16, ignored=0.2), register)


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
    too_wide, coupled = make(2, 3, 8192), make(2, 3, 10, symmetric=True)
    with pytest.raises(ValueError, match=r"K = 2 peers and C = 8192 classes"):
        register(too_wide)
    with pytest.raises(ValueError, match="symmetric"):
        register(coupled)
    with pytest.raises(ValueError, match="upstream"):
        register(make(2, 3, 10), upstream=torch.ones(2, device=DEVICE))
    assert launched(too_wide).losses.isfinite().all()
