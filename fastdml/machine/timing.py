"""Measuring several contenders at once.

Rounds are interleaved: in each round every contender is timed once, in an order drawn anew, so that
whatever else the machine does hits all of them alike. A contender is a function of n that makes n
calls and returns the seconds they took, such as `wall` makes of a call.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastdml.engine.graph import without_collector

Timer = Callable[[int], float]  # calls -> seconds they took together
SHORTEST = 0.002  # seconds a sample, so that the timer's own cost does not count
REST = 0.005  # seconds before a sample: threads of the one before stop spinning and free the cores


def interleave(
    timers: Mapping[str, Timer], seconds: float, *, fewest: int = 5, most: int = 100
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round: rounds for about `seconds`, `fewest` to `most`. Each
    contender must have been called before: the first call compiles, allocates and so on."""
    with without_collector():
        return _rounds(timers, seconds, fewest, most)


def _rounds(
    timers: Mapping[str, Timer], seconds: float, fewest: int, most: int
) -> dict[str, list[float]]:
    guess = {name: max(timer(1), 1e-7) for name, timer in timers.items()}
    calls = {name: max(1, math.ceil(SHORTEST / guess[name])) for name in timers}
    a_round = sum(REST + guess[name] * calls[name] for name in timers)
    rounds = min(max(int(seconds / max(a_round, 1e-9)), fewest), most)  # 0 s: no contender ran
    draw = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name in draw.sample(list(timers), len(timers)):
            time.sleep(REST)
            if calls[name] > 1:
                timers[name](1)  # so that no timed call is the first after the rest
            samples[name].append(timers[name](calls[name]) / calls[name])
    return samples


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(call: Callable[[], Any], device: torch.device) -> Timer:
    """The seconds that the host sees, ending with the device idle."""

    def timer(calls: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        return time.perf_counter() - start

    return timer
