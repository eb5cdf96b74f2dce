"""The host's work for a call of the loss, as a number of calls: of functions in Python, and of
built-in ones from Python. Seconds depend on the machine and on what else it does; calls do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from on_stand_in import scenarios_of

from bench import host_time

# Calls of what is measured at K = 2 and at 8. They differ by a few percent between releases of
# Python, torch and Triton; a tenth of it is for those to come.
MOST_CALLS = {
    "launch": (90, 135),
    "forward": (175, 270),
    "forward + sum + backward": (300, 440),
    "value_and_grad": (150, 225),
}


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in_host_time")


def number_of_calls(call: Callable[[], Any]) -> int:
    """Calls that a call makes, itself included."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found - 1  # without the one that ends it


def in_steady_state(call: Callable[[], Any]) -> int:
    """The same once everything is compiled."""
    for _ in range(3):
        call()
    return number_of_calls(call)


def calls(gpu):
    return {
        K: {name: in_steady_state(call) for name, call in host_time.our_calls(K, N, C).items()}
        for K, N, C in host_time.SHAPES
    }


@pytest.mark.parametrize("name", MOST_CALLS)
def test_calls_of_a_launch_and_of_what_surrounds_it(seen, name):
    for (K, found), most in zip(seen(calls).items(), MOST_CALLS[name], strict=True):
        assert 0 < found[name] <= most, f"K = {K}: {found[name]} calls of at most {most}"


def other_batch_sizes(gpu):
    """Calls of the first time for each of several sizes, after another size is known."""
    sizes = {N: host_time.our_calls(2, N, 100) for N in (64, 63, 1, 200)}
    known = sizes.pop(64)
    return {
        name: [in_steady_state(known[name]), *(number_of_calls(of[name]) for of in sizes.values())]
        for name in ("value_and_grad", "forward + sum + backward")
    }


def test_a_batch_of_another_size_takes_no_more(seen):
    for name, (known, *others) in seen(other_batch_sizes).items():
        assert max(others) <= known + 10, (name, known, others)


SCENARIOS = [calls, other_batch_sizes]
