"""Measuring several contenders at once, and handing the samples to pytest-benchmark.

`fastdml.machine.timing` has the rounds and `wall`, what the host sees; here is `replay`, the
device's time alone: calls captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdml.engine.graph import without_collector
from fastdml.machine.timing import Timer, wait, wall
from fastdml.machine.timing import interleave as rounds

ROUNDS = 100  # at most, whatever a benchmark asks for: a dry run sets one
CALLS_A_GRAPH = 8


def interleave(
    timers: Mapping[str, Timer], seconds: float, *, fewest: int = 5, most: int = ROUNDS
) -> dict[str, list[float]]:
    """`fastdml.machine.timing.interleave` with at most `ROUNDS` rounds."""
    return rounds(timers, seconds, fewest=min(fewest, ROUNDS), most=min(most, ROUNDS))


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
    """Bytes that a call needs at its peak beyond what was allocated before, results included."""
    if device.type != "cuda":
        return _extra_memory_of_cpu(call)
    wait(device)
    with without_collector():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before


def _extra_memory_of_cpu(call: Callable[[], Any]) -> int:
    """From what torch's allocator reports to its profiler; others' memory is not seen."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        without_collector(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        kept = call()
    del kept
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()  # below 0 where memory is freed
        peak = max(peak, now)
    return peak


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
