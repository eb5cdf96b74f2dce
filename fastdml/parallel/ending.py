"""The end of a process that had a mesh: its process groups go before the interpreter does.

A thread of a gloo group frees the tensors of a collective a moment after the collective is done,
when whoever waited for it goes on already. To free them it takes Python's lock; where the
interpreter has begun to end, Python before 3.14 ends the thread instead, in the middle of C++ that
allows no such thing, and the process dies by SIGABRT ("terminate called without an active
exception"). Destroying a group waits for its threads.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from functools import cache
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

# Meshes and replicas: what knows groups, and may be among a script's globals until the end.
HOLDERS: WeakSet[Any] = WeakSet()
_STATE = {"started": False, "failed": False}


def started() -> None:
    """Call where fastdml itself has started torch.distributed, which it then ends too."""
    _STATE["started"] = True


def failed() -> None:
    """Call where an error leaves a run: this rank's collectives may now wait for ranks that do not
    come, and the end of the process does not wait for them."""
    _STATE["failed"] = True


def hold(holder: Any) -> None:
    """Call for each mesh or replica: what it knows is let go when the interpreter ends."""
    HOLDERS.add(holder)
    _at_exit(os.getpid())


@cache
def _at_exit(pid: int) -> None:
    atexit.register(_end, pid)


def _end(pid: int) -> None:
    # A forked child has the groups of its parent, and none of their threads.
    if pid != os.getpid() or _STATE["failed"] or hasattr(sys, "last_type"):
        return
    # These references are the last that go. Another's end, such as that of the reducer in a
    # DistributedDataParallel, would hold Python's lock while it waits for a thread that wants it.
    groups = [group for holder in HOLDERS for group in vars(holder).get("groups", ())]
    for holder in [*HOLDERS]:
        vars(holder).clear()
    gc.collect()
    if _STATE["started"] and dist.is_initialized():
        dist.destroy_process_group()
    del groups
