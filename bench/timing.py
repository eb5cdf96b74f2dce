"""Measuring several contenders at once, and handing the samples to pytest-benchmark.

Rounds are interleaved: in each round every contender is timed once, in an order drawn anew, so that
whatever else the machine does hits all of them alike. A contender is a function of n that makes n
calls and returns the seconds they took: `wall` (what the host sees, ending with the device idle) or
`replay` (the device's time alone: calls captured in a CUDA graph).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdml.engine.graph import without_collector

Timer = Callable[[int], float]  # calls -> seconds they took together
SHORTEST = 0.002  # seconds a sample, so that the timer's own cost does not count
REST = 0.005  # seconds before a sample: threads of the one before stop spinning and free the cores
ROUNDS = 100  # at most, whatever a benchmark asks for: a dry run sets one
CALLS_A_GRAPH = 8


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
    rounds = min(
        max(int(seconds / max(a_round, 1e-9)), fewest), most, ROUNDS
    )  # 0: no contender ran
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
    def timer(calls: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        return time.perf_counter() - start

    return timer


def replay(calls: Sequence[Callable[[], Any]], pool: Any) -> Timer:
    """`calls` do the same on inputs of their own, enough of them that the inputs of large shapes
    have left the L2 cache when their turn comes again. Raises RuntimeError where a call needs the
    host and so cannot be captured. `pool` is shared: only one graph's results are valid at a time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first call may allocate: outside the graph
        for call in calls:
            call()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a capture that breaks off harms those after it
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with without_collector(), torch.cuda.graph(graph, pool=pool):
        for i in range(CALLS_A_GRAPH):
            calls[i % len(calls)]()

    def timer(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replays = math.ceil(calls / CALLS_A_GRAPH)
        graph.replay()  # keeps the device busy while the host issues the others
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 * calls / (replays * CALLS_A_GRAPH)

    return timer


def device_time(calls: Sequence[Callable[[], Any]], pool: Any, device: torch.device) -> Timer:
    """`replay`; in a dry run without a device, `wall` in its place."""
    if device.type == "cuda":
        return replay(calls, pool)
    for call in calls:
        call()
    return wall(calls[0], device)


def extra_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs at its peak beyond what was allocated before, results included; in a
    dry run without a device, 0."""
    if device.type != "cuda":
        call()
        return 0
    wait(device)
    with without_collector():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a second of a device copy, read and written: the median of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer = wall(lambda: target.copy_(source), device)
    timer(2)
    seconds = sorted(timer(5) / 5 for _ in range(10))
    return 2 * size / seconds[5]


class ReplayClock:
    """A clock for pytest-benchmark that gives back samples taken before: a benchmark that calls
    `advance` appears to take exactly the sample's time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()


def hand_over(benchmark: Any, samples: Sequence[float]) -> None:
    """Makes `samples` the rounds of a pytest-benchmark fixture, whose timer must be CLOCK."""
    rest = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(rest)), rounds=len(samples))
