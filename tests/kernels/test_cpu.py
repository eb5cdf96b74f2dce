"""The closed form on the CPU: every pair of options, every size, blocks of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastdml_kernels import cpu as cpu_module
from fastdml_kernels import cpu_plain
from hypothesis import given, settings
from oracle import LAYOUTS, OPTIONS, check, cpu, make, problems, upstream_of


@pytest.mark.parametrize("one", OPTIONS)
def test_every_pair_of_options(one):
    for other in [name for name in OPTIONS if name >= one]:
        for values in itertools.product(OPTIONS[one], OPTIONS[other]):
            p = make(3, 12, 10, ignored=0.2, **dict(zip((one, other), values, strict=True)))
            check(p, upstream=upstream_of(p))


@given(problems(most_logits=40_000))
@settings(max_examples=120, deadline=None)
def test_any_shape_layout_dtype_and_three_options(drawn):
    p, upstream = drawn
    check(p, upstream=upstream)


@pytest.mark.slow
@given(problems(most_logits=300_000))
@settings(max_examples=500, deadline=None)
def test_any_shape_layout_dtype_and_three_options_at_length(drawn):
    p, upstream = drawn
    check(p, upstream=upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"temperature": 2.0}])
def test_float64_logits_stay_in_float64(layout, options):
    own = check(make(3, 20, 10, dtype=torch.float64, layout=layout, **options))
    assert own.losses.dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"target": "ensemble", "gate": "best"}, {"symmetric": True},
     {"class_weight": True, "label_smoothing": 0.1}, {"temperature": 3.0},
     {"mimic_ignored": True}, {"target": "ensemble_logits", "reduction": "sum"}],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_blocks_of_rows_leave_no_seam(monkeypatch, rows, options):
    """Several blocks, the last one ragged, one of them not finite and worked through with care."""
    K, N, C = 3, 20, 10
    for module in (cpu_module, cpu_plain):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * K * C * rows)
    p = make(K, N, C, ignored=0.2, **options)
    check(p)
    p.logits[1][13, 4] = -torch.inf
    p.labels[13] = 5
    check(p, yardsticks=False, grad=False)


def test_wide_rows():
    check(make(2, 40, 32_000, dtype=torch.bfloat16))


def test_buffers_from_inference_mode_and_grad_mode_are_the_same():
    p = make(2, 8, 10)
    with torch.inference_mode():
        inside = cpu(p)
    assert torch.equal(inside.losses, cpu(p).losses)


def test_an_ignore_index_among_the_labels_that_no_row_has():
    p = make(2, 3, 10, ignore_index=4)
    p.labels[:] = torch.tensor([2, 3, 8])
    check(p)
