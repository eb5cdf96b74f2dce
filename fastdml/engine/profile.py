"""A few steps under torch's profiler: a Chrome trace and a page of text.

On CUDA the page counts kernels and copies and says how busy the device was: `busy` is the time in
which at least one ran, and the overlap factor is the sum of all their times over the wall time, so
two peers that ran side by side throughout give 2 and a device that waited half the time 0.5. Host
waits are its calls that wait for a stream or an event, which a step should have none of. On a CPU
it counts operators and their own times. Profiling slows eager steps; a graph's replay it hardly
touches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from fastdml.files import partial, write_atomically
from fastdml.torch_private import is_annotation, stream_of

SKIPPED, WARM_UP, STEPS = 10, 2, 10
TRACE, PAGE = "trace.json", "profile.txt"
ROWS, WIDTH = 20, 60  # of the table
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class Span(NamedTuple):
    name: str
    start: float  # microseconds
    end: float
    own: float  # without what it calls, which has a span itself
    branch: int  # stream


class Profile:
    """`step()` after each step; writes into `folder` as soon as enough are recorded, or at the end.

    steps: an epoch's; the recording fits into the first where that is long enough.
    """

    def __init__(self, folder: Path, device: torch.device, wanted: bool, steps: int) -> None:
        self.folder, self.device = folder, device
        self.recorder: profile | None = None
        self.done = 0
        if not wanted:
            return
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        active = max(min(STEPS, steps - WARM_UP), 1)
        skipped = min(SKIPPED, max(steps - active - WARM_UP, 0))
        self.before = skipped + WARM_UP
        self.recorder = profile(
            activities=activities,
            schedule=schedule(wait=skipped, warmup=WARM_UP, active=active, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Profile:
        if self.recorder is not None:
            self.recorder.start()
        return self

    def step(self) -> None:
        if self.recorder is not None:
            self.done += 1
            self.recorder.step()

    def __exit__(self, *_: object) -> None:
        if self.recorder is not None:
            self.recorder.stop()

    def _write(self, recorder: profile) -> None:
        trace = self.folder / TRACE
        recorder.export_chrome_trace(str(partial(trace)))
        partial(trace).replace(trace)
        events = recorder.events()
        waits = sum(e.name in WAITS for e in events)
        text = page(spans(events, self.device), self.done - self.before, self.device, waits)
        write_atomically(self.folder / PAGE, text)


def spans(events: Iterable[Any], device: torch.device) -> list[Span]:
    """The profiler's events: what ran on a CUDA device, or operators on a CPU."""
    cuda = device.type == "cuda"
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    return [
        Span(
            e.name,
            e.time_range.start,
            e.time_range.end,
            e.time_range.elapsed_us() if cuda else e.self_cpu_time_total,
            stream_of(e),
        )
        for e in events
        if e.device_type == kind and not is_annotation(e) and not e.name.startswith("ProfilerStep")
    ]


def page(found: Sequence[Span], steps: int, device: torch.device, waits: int = 0) -> str:
    """One page of text about `steps` recorded steps."""
    if not found or steps < 1:
        return "the run ended before the profiler recorded a step\n"
    cuda = device.type == "cuda"
    what = "kernels and copies" if cuda else "operators"
    wall = max(s.end for s in found) - min(s.start for s in found)
    total = sum(s.own for s in found)
    rows = [
        ("steps recorded", f"{steps}"),
        ("wall time a step", f"{wall / steps / 1000:.3f} ms"),
        (f"{what} a step", f"{len(found) / steps:.1f}"),
        ("their time a step", f"{total / steps / 1000:.3f} ms"),
    ]
    if cuda:
        branches: defaultdict[int, float] = defaultdict(float)
        for s in found:
            branches[s.branch] += s.own
        rows += [
            ("busy", f"{100 * busy(found) / wall:.1f} % of the wall time"),
            ("overlap factor", f"{total / wall:.2f} = time of all branches / wall time"),
            ("host waits a step", f"{waits / steps:.1f}"),
            ("streams", ", ".join(f"{t / steps / 1000:.3f} ms" for t in branches.values())),
        ]
    times: defaultdict[str, float] = defaultdict(float)
    counts = Counter(s.name for s in found)
    for s in found:
        times[s.name] += s.own
    lines = [f"{name:<{len(what) + 8}} {text}" for name, text in rows]
    lines += ["", f"{'ms a step':>10} {'a step':>8}  {what}, the longest"]
    for name in sorted(times, key=times.__getitem__, reverse=True)[:ROWS]:
        short = name if len(name) <= WIDTH else name[: WIDTH - 3] + "..."
        lines.append(f"{times[name] / steps / 1000:>10.3f} {counts[name] / steps:>8.1f}  {short}")
    return "\n".join(lines) + "\n"


def busy(found: Iterable[Span]) -> float:
    """Microseconds in which at least one of the spans ran."""
    total, until = 0.0, float("-inf")
    for s in sorted(found, key=lambda s: s.start):
        total += max(0.0, s.end - max(s.start, until))
        until = max(until, s.end)
    return total
