"""Starts torch.distributed among the processes that torchrun started, and their devices."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

from fastdml.errors import InputError

# What torchrun, and whoever stands in for it, tells each process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def world_size() -> int:
    """The number of ranks, of which there is one where no launcher started this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if started() else 1


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


def start(device: torch.device, timeout: float) -> None:
    """Initialises torch.distributed, with NCCL for CUDA and gloo for a CPU, unless that is done."""
    if dist.is_initialized():
        return
    limit = datetime.timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = backend_of(device)
    if not started():
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit
        )
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise InputError(f"{missing[0]} is not set beside RANK: start the ranks with torchrun")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, store=_store(rank, limit), rank=rank, world_size=world, timeout=limit
    )


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _store(rank: int, limit: datetime.timedelta) -> dist.Store:
    """The launcher's store, or one that rank 0 holds. What an attempt writes begins with its
    number: a restarted job would else read the addresses of processes that are gone."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not of_agent,
        timeout=limit,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"fastdml/{attempt}", store)
