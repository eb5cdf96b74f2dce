"""Work that takes as long as it takes, such as a download, done by one rank of each node before the
others, which wait for it as long as it lives.

A collective would give up after the mesh's timeout. Here a thread of whoever works counts up a key
of the store, and who waits gives up only where that number stands still for the timeout: because
the process was stopped, or its machine is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastdml.errors import InputError
from fastdml.parallel.failure import describe, raise_if_noted

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh

POLL = 0.05  # seconds between two looks at the store


@contextmanager
def working(mesh: Mesh, name: str) -> Iterator[None]:
    """Counts up while this rank is inside, so that others see that it lives; it is done after."""
    over, key = threading.Event(), f"{name}/{mesh.rank}"

    def count() -> None:
        while not over.wait(min(1.0, mesh.timeout / 10)):
            mesh.store.add(f"{key}/alive", 1)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    mesh.store.set(f"{key}/done", "1")


def wait_for(mesh: Mesh, name: str, ranks: Sequence[int]) -> None:
    """Returns when all these ranks are done with what has this name. Raises RankLost where one has
    failed, and InputError where one has not been heard of for the mesh's timeout."""
    for rank in ranks:
        heard, count = time.monotonic(), 0
        while not mesh.store.check([f"{name}/{rank}/done"]):
            raise_if_noted(mesh)
            time.sleep(POLL)
            found = mesh.store.add(f"{name}/{rank}/alive", 0)
            if found != count:
                heard, count = time.monotonic(), found
            elif time.monotonic() - heard > mesh.timeout:
                raise InputError(
                    f"{describe(mesh, rank)} has not been heard of for {mesh.timeout:g} s while it "
                    "prepared data: look at its machine, or give a larger timeout"
                )
