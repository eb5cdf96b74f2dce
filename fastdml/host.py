"""The CPUs and the memory that this process may use: the machine's, or a container's share of them.

Linux's /proc and cgroups (version 1 and 2) say it; elsewhere nothing is known to be limited.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
MEMINFO = Path("/proc/meminfo")


def cpus() -> int:
    """CPUs that this process may use: by its affinity (and so its cpuset), and at most its cgroup's
    quota, rounded up."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; heeds -X cpu_count and PYTHON_CPU_COUNT
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return max(1, math.ceil(min(count or 1, quota())))


def quota(proc: Path = PROC) -> float:
    """CPUs' worth of time that the cgroups of this process allow, their ancestors' included;
    infinity where nothing limits it."""
    return min(map(_cpu_limit, _groups("cpu", proc)), default=math.inf)


def memory(proc: Path = PROC, meminfo: Path = MEMINFO) -> tuple[float, float]:
    """(bytes that this process and those beside it may use, bytes of them that are free): the
    machine's memory, or less where cgroups limit it. NaN where the system does not say."""
    try:
        lines = (line.split() for line in meminfo.read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines if len(words) > 1}
        total = 1024.0 * kilobytes["MemTotal:"]
        free = 1024.0 * kilobytes["MemAvailable:"]
    except (OSError, KeyError, ValueError):
        return math.nan, math.nan
    for folder in _groups("memory", proc):
        limit = _memory_limit(folder)
        total = min(total, limit)
        free = min(free, max(0, limit - _memory_used(folder)))
    return total, free


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """The folder of each cgroup of this process that has the controller, then of those above it."""
    try:
        mounts = (proc / "mountinfo").read_text().splitlines()
        groups = (proc / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for top, own in _mounted(mounts, path, controller if controllers else None):
            # Only the mounted part of the tree can be read: the process's group and those above it.
            for folder in (own, *own.parents):
                yield folder
                if folder == top:
                    break


def _mounted(mounts: list[str], path: str, controller: str | None) -> Iterator[tuple[Path, Path]]:
    """(where the hierarchy is mounted, the group's own folder in it). controller: None in version
    2, where one hierarchy has all."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind != ("cgroup2" if controller is None else "cgroup"):
            continue
        if controller is not None and controller not in options.split(","):
            continue
        root, point = before.split(" ")[3:5]
        top = Path(point)
        inside = os.path.relpath(path, root)
        # A path above the mounted part, or beside it, belongs to another namespace.
        yield top, top if inside.startswith("..") else top / inside


def _cpu_limit(group: Path) -> float:
    """CPUs' worth of time that one group may have."""
    try:
        if (group / "cpu.max").exists():
            time, period = (group / "cpu.max").read_text().split()
        else:
            time = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(time) / int(period) if int(time) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return math.inf


def _memory_limit(group: Path) -> float:
    """Bytes that one group may have. Version 1 writes a number near 2**63 for no limit."""
    return _first_number(group / "memory.max", group / "memory.limit_in_bytes", missing=math.inf)


def _memory_used(group: Path) -> float:
    """Bytes that one group has, without cached files, which make way."""
    used = _first_number(group / "memory.current", group / "memory.usage_in_bytes", missing=0)
    try:
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = {name: int(value) for name, value in lines}
    except (OSError, ValueError):
        return used
    return used - cached.get("total_inactive_file", cached.get("inactive_file", 0))


def _first_number(*files: Path, missing: float) -> float:
    """The number in the first of the files that has one."""
    for file in files:
        try:
            return int(file.read_text())
        except (OSError, ValueError):  # no such file; "max"
            continue
    return missing
