"""torch's threads on the CPUs that this process may use.

A container's share of the time (a cgroup's quota) is invisible to torch, which starts a thread a
core of the machine: once they have used up the share, all are stopped together until the next
period. Threads that wait for each other after every layer suffer in the same way where other
processes take the cores, so `fastdml.engine.auto` measures how many pay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastdml import host


def asked() -> int | None:
    """The number of threads that OMP_NUM_THREADS asks for, or None where it is not set, or is set
    to something that OpenMP ignores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return torch.get_num_threads() if first.isdecimal() and int(first) > 0 else None


def most() -> int:
    """The most threads worth trying: torch's own number, which a caller may have lowered, but not
    more than there are CPUs."""
    return min(torch.get_num_threads(), host.cpus())


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
