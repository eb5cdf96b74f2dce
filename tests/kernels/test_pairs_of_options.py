"""Any two options of the loss occur together, on the CPU's two ways and in each kernel.

Covering arrays: each problem has every option at one of its values, and over all problems any two
values of any two options meet.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from covering import Covering
from fastdml_kernels import cpu_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OPTIONS, check, close_calls, cpu, make, register, upstream_of, wide

DTYPES = {"mixed": (torch.bfloat16, torch.float32, torch.float16, torch.float32)}
DTYPES |= {str(d).removeprefix("torch."): (d,) * 4 for d in (torch.float32, torch.bfloat16)}
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "ce_weight": 1.0, "kl_weight": 1.0, "target": "peers", "gate": "none",
    "divergence": "forward", "students": None, "detach_targets": True, "label_smoothing": 0.0,
    "mimic_ignored": False, "reduction": "mean", "ignore_index": -100, "peer_weights": False,
    "class_weight": False, "sample_weight": False,
}  # fmt: skip
SPACE = {name: (default, *OPTIONS[name]) for name, default in DEFAULTS.items()} | {
    "K": (2, 3, 4), "dtype": tuple(DTYPES), "layout": ("contiguous", "stacked", "sliced"),
    "ignored": (0.0, 0.3), "stats": (True, False),
}  # fmt: skip
IN_REGISTERS = {"target": ("peers", "ensemble"), "detach_targets": (True,)}


@cache
def rows_of(kernel: str) -> list[dict[str, Any]]:
    space = SPACE | IN_REGISTERS if kernel == "register" else SPACE
    return Covering(space, 2).rows()


def check_row(path, row: dict[str, Any], N: int, C: int, seed: int = 0) -> None:
    row = dict(row)
    stats, K = row.pop("stats"), row.pop("K")
    p = make(K, N, C, seed=seed, **row | {"dtype": DTYPES[row["dtype"]][:K]})
    if p.options.gate == "best" and close_calls(p)[0]:
        return  # float32 may choose the other
    check(p, path, upstream=upstream_of(p), stats=stats)


def test_every_option_is_among_them():
    assert {*OPTIONS} == {*DEFAULTS}


@pytest.mark.parametrize("native", [True, False])
def test_on_the_cpu(monkeypatch, native):
    if not native:
        monkeypatch.setattr(cpu_rows, "library", lambda: None)
    for at, row in enumerate(rows_of("cpu")):
        check_row(cpu, row, 12, 10, seed=at)


@given(st.integers(0, 2**16), st.integers(1, 40), st.sampled_from([1, 2, 7, 33, 100]))
@settings(max_examples=60, deadline=None)
def test_all_options_at_once_on_the_cpu(seed, N, C):
    check_row(cpu, Covering(SPACE, 2, seed=seed).random_row(), N, C, seed)


@pytest.mark.slow  # interpreted
@pytest.mark.parametrize("kernel", ["register", "wide"])
def test_in_the_kernels(kernel):
    path = {"register": register, "wide": wide}[kernel]
    for at, row in enumerate(rows_of(kernel)):
        check_row(path, row, 3, 7, seed=at)
