"""Runs a function on several ranks of one machine, in processes that start in no time.

Ranks are forked from a server that has imported torch and fastdml already: a job takes 0.3 s, where
torchrun takes 5. The rendezvous store lives in this process, so that no port is guessed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing import connection
from typing import Any

import torch.distributed as dist

PRELOADED = [
    "pytest", "numpy", "torch", "torch.distributed", "torch.distributed.device_mesh",
    "torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch._dynamo",  # which the first optimizer imports, for a second
    "fastdml", "fastdml.parallel", "fastdml.engine", "fastdml.train",
    "fastdml.train.run", "fastdml.cli.train", "safetensors.torch", "matplotlib.pyplot", "yaml",
    "sklearn.datasets",
]  # fmt: skip


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; `rank` is its number."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(f"rank {rank} {what}")
        self.rank = rank


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    lost: Collection[int] = (),
) -> list:
    """Calls function(*args), a function of a module, on each of `world` ranks with torchrun's
    environment; its results, in the order of the ranks.

    lost: ranks that are to die or hang: nobody waits for them, and their result is None.

    Raises RankFailed with the traceback of the first rank that raises, dies or is late; the others
    are killed. Results and arguments are pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks, readers = [], {}
    for rank in range(world):
        reader, writer = context.Pipe(duplex=False)
        readers[reader] = rank
        process = context.Process(
            target=_rank, args=(rank, world, store.port, writer, function, args)
        )
        process.start()
        writer.close()
        ranks.append(process)
    try:
        awaited = {reader: rank for reader, rank in readers.items() if rank not in lost}
        found = _results(awaited, time.monotonic() + timeout, timeout)
        return [found.get(rank) for rank in range(world)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _results(readers: dict[Any, int], deadline: float, timeout: float) -> dict[int, Any]:
    results = {}
    while readers:
        ready = connection.wait([*readers], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(min(readers.values()), f"did not end within {timeout} s")
        for reader in ready:
            rank = readers.pop(reader)
            try:
                fine, result = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RankFailed(rank, "died") from None
            if not fine:
                raise RankFailed(rank, f"raised\n{result}")
            results[rank] = result
    return results


def become(rank: int, world: int, port: int) -> None:
    """Tells this process what torchrun's agent, whose store is at `port`, would."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip


def _rank(
    rank: int, world: int, port: int, writer: Any, function: Callable[..., Any], args: tuple
) -> None:
    become(rank, world, port)
    try:
        message = True, function(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        message = False, traceback.format_exc()
    # By the usual pickle: torch's own for processes would share memory that ends with this one.
    writer.send_bytes(pickle.dumps(message))
    writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
