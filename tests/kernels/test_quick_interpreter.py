"""What the interpreter leaves out changes nothing, and a launch after one that failed works."""

from __future__ import annotations

from collections import Counter

import pytest
import quick_interpreter
import torch
import triton
import triton.language as tl
from oracle import DEVICE, make, register, wide
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="kernels run on the device, not in Triton")
JSD = {"divergence": "jsd", "class_weight": True, "label_smoothing": 0.1}


@triton.jit
def add_rows(x, STOP: tl.constexpr):
    """Sums within functions of functions; a static_assert fails in the middle of them."""
    tl.static_assert(not STOP)
    return tl.sum(x, 0) + tl.max(tl.zeros_like(x), 0)


@triton.jit
def sums(x, out, STOP: tl.constexpr):
    tl.store(out, add_rows(tl.load(x + tl.arange(0, 8)), STOP))


@pytest.mark.parametrize("run", [register, wide])
def test_numbers_are_those_of_tritons_own_interpreter(monkeypatch, run):
    p = make(3, 4, 13, ignored=0.2, **JSD)
    quick = run(p)
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", quick_interpreter.replace_for)
        patch.setattr(interpreter.GridExecutor, "__call__", quick_interpreter.launch)
        own = run(p)
    assert torch.equal(quick.losses, own.losses)
    assert all(map(torch.equal, quick.grads, own.grads))
    assert all(torch.equal(quick.stats[name], own.stats[name]) for name in own.stats)


def test_a_launch_replaces_each_language_once(monkeypatch):
    seen = Counter()

    def replace_for(function, replace=quick_interpreter.replace_for):
        seen[quick_interpreter.languages(function)] += 1
        return replace(function)

    monkeypatch.setattr(quick_interpreter, "replace_for", replace_for)
    for launches in (1, 2):
        wide(make(2, 3, 9))
        assert set(seen.values()) == {launches}
        assert len(seen) == len(frozenset().union(*seen))


def test_after_a_launch_that_failed_the_next_one_works():
    x, out = torch.arange(8.0), torch.zeros(1)
    before = tl.load
    with pytest.raises(interpreter.InterpreterError):
        sums[(1,)](x, out, True)
    assert not quick_interpreter.replaced
    assert tl.load is before
    sums[(1,)](x, out, False)
    assert out.item() == 28.0
    assert tl.load is before
