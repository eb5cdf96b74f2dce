"""The CPUs that this process may use, and torch's threads on them.

A container's share of the time (a cgroup's quota) is invisible to torch, which starts a thread a
core of the machine: once they have used up the share, all are stopped together until the next
period. Threads that wait for each other after every layer suffer in the same way where other
processes take the cores, so `fastdml.engine.auto` measures how many pay.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PROC = Path("/proc/self")


def available() -> int:
    """CPUs that this process may use: by its affinity (and so its cpuset), and at most its cgroup's
    quota, rounded up."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; heeds -X cpu_count and PYTHON_CPU_COUNT
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return max(1, math.ceil(min(count or 1, quota())))


def asked() -> int | None:
    """The number of threads that OMP_NUM_THREADS asks for, or None where it is not set, or is set
    to something that OpenMP ignores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return torch.get_num_threads() if first.isdecimal() and int(first) > 0 else None


def most() -> int:
    """The most threads worth trying: torch's own number, which a caller may have lowered, but not
    more than there are CPUs."""
    return min(torch.get_num_threads(), available())


def sensible() -> int:
    """The number of threads where none is measured: the user's, else as many as there are CPUs."""
    return asked() or most()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within it, torch uses `count` threads; None changes nothing. Costs less than a
    microsecond."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quota(proc: Path = PROC) -> float:
    """CPUs' worth of time that the cgroups of this process allow, of version 1 and 2, their
    ancestors' included; infinity where nothing limits it."""
    try:
        mounts = (proc / "mountinfo").read_text().splitlines()
        groups = (proc / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    least = math.inf
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in _mounted(mounts, path, version=1 if controllers else 2):
            # Only the mounted part of the tree can be read: the process's group and those above it.
            for folder in (top[1], *top[1].parents):
                least = min(least, _limit(folder))
                if folder == top[0]:
                    break
    return least


def _mounted(mounts: list[str], path: str, version: int) -> Iterator[tuple[Path, Path]]:
    """(where the hierarchy is mounted, the group's own folder in it)."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind != ("cgroup2" if version == 2 else "cgroup"):
            continue
        if version == 1 and "cpu" not in options.split(","):
            continue
        root, point = before.split(" ")[3:5]
        top = Path(point)
        inside = os.path.relpath(path, root)
        # A path above the mounted part, or beside it, belongs to another namespace.
        yield top, top if inside.startswith("..") else top / inside


def _limit(folder: Path) -> float:
    """CPUs' worth of time that one group may have."""
    try:
        if (folder / "cpu.max").exists():
            time, period = (folder / "cpu.max").read_text().split()
        else:
            time = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(time) / int(period) if int(time) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return math.inf
