"""Starts torch.distributed among the processes that torchrun started, and their devices."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastdml.errors import InputError
from fastdml.parallel import ending
from fastdml.torch_private import default_store

# What torchrun, and whoever stands in for it, tells each process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLL = 0.01  # seconds between looks into a store
STARTING = 120.0  # seconds that ranks have at least until all have imported what they need


def started(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def world_size() -> int:
    """The number of ranks, of which there is one where no launcher started this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if started() else 1


def own_rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if started() else 0


def own_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this rank: of CUDA's the one with its number among the ranks of this machine.

    device: "cpu", "cuda", "auto" or None, which take CUDA where it is, or one with a number, which
    is for one rank alone. Raises InputError where this machine has fewer devices than ranks.
    """
    wanted = "auto" if device is None else str(device)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.partition(":")[0] != "cuda":
        return torch.device(wanted)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    if ":" in wanted:
        if world_size() > 1 and wanted != f"cuda:{local}":
            raise InputError(
                f"device {wanted} is one GPU, and there are {world_size()} ranks: say cuda, and "
                "each rank takes its own"
            )
        local = int(wanted.partition(":")[2])
    if local >= there:
        raise InputError(
            f"rank {os.environ.get('RANK', 0)} needs GPU {local} of its machine, where torch finds "
            f"{there}: start at most as many ranks a machine as it has GPUs, or say cpu"
        )
    return torch.device("cuda", local)


class RankLost(RuntimeError):
    """The job cannot go on, because of another rank: one line that names it and the reason."""


class Job(NamedTuple):
    """What the ranks of a job write for each other; `start` makes it.

    store: of this attempt alone. job_store: of all attempts, held by torchrun's agent; None where a
    rank holds it, with which it ends. attempt: 0, 1, ...: how often the ranks were started before.
    """

    store: dist.Store
    job_store: dist.Store | None
    attempt: int


_JOB: list[Job] = []  # of this process, while torch.distributed runs


def start(device: torch.device, timeout: float) -> Job:
    """Initialises torch.distributed, with NCCL for CUDA and gloo for a CPU, unless that is done."""
    if dist.is_initialized() and _JOB:
        return _JOB[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        job = Job(dist.PrefixStore("fastdml", default_store()), None, 0)
    elif started():
        job = _join(timeout)
    else:
        job = Job(dist.HashStore(), None, 0)
    if not dist.is_initialized():
        # Default arguments in it would keep the group that is there when it is imported.

        dist.init_process_group(
            backend_of(device),
            store=job.store,
            rank=own_rank(),
            world_size=world_size(),
            timeout=datetime.timedelta(seconds=timeout),
        )
        ending.started()
    _JOB[:] = [job]
    return job


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _join(timeout: float) -> Job:
    """Meets the other ranks of this attempt in the launcher's store, or in one that rank 0 holds.

    What an attempt writes begins with its number: a restarted job would else read the addresses of
    processes that are gone.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise InputError(f"{missing[0]} is not set beside RANK: start the ranks with torchrun")
    limit = max(timeout, STARTING)
    try:
        store = _launchers_store(limit)
    except dist.DistError:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(f"no store of the job answers at {address} within {limit:g} s") from None
    job_store = dist.PrefixStore("fastdml", store)
    number = _number(job_store, own_rank(), world_size(), limit)
    this = dist.PrefixStore(f"fastdml/attempt{number}", store)
    return Job(this, job_store if _agent_has_store() else None, number - 1)


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launchers_store(limit: float) -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=own_rank() == 0 and not _agent_has_store(),
        timeout=datetime.timedelta(seconds=limit),
    )


def reachable_store() -> dist.Store | None:
    """A store that all attempts share, or else this one's ranks; also before `start`, where
    torchrun's agent has one."""
    if _JOB:
        return _JOB[0].job_store or _JOB[0].store
    if started() and _agent_has_store() and "MASTER_PORT" in os.environ:
        return dist.PrefixStore("fastdml", _launchers_store(10.0))
    return None


def _number(store: dist.Store, rank: int, world: int, limit: float) -> int:
    """The number of this attempt, from 1, the same on all ranks. torchrun's own count is one of a
    machine, and machines may have been restarted more or less often.

    Rank 0 counts, and answers each other rank until that has thanked: it may find the question of a
    process that is gone before that of its successor. Raises RankLost after `limit` seconds.
    """
    end = time.monotonic() + limit
    if rank != 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        _wait(store, f"answer/{question}", end, 0)
        number = int(store.get(f"answer/{question}"))
        store.set(f"thanks/{number}/{rank}", "")
        return number
    number = store.add("attempts", 1)
    for other in range(1, world):
        while not store.check([f"thanks/{number}/{other}"]):
            _wait(store, f"question/{other}", end, other)
            store.set(f"answer/{store.get(f'question/{other}').decode()}", str(number))
            time.sleep(POLL)
            if time.monotonic() > end:
                raise RankLost(f"rank {other} did not start in time")
    return number


def _wait(store: dist.Store, key: str, end: float, rank: int) -> None:
    """Without the store's own wait, which prints a warning where it is in vain."""
    while not store.check([key]):
        if time.monotonic() > end:
            raise RankLost(f"rank {rank} did not start in time")
        time.sleep(POLL)
