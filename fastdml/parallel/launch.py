"""Starts the ranks of a job on this machine as torchrun does, with the settings that work.

The rendezvous is static, on a free loopback port: no second machine can join, so that nothing needs
to be found. The agent looks at its processes every 2 s, not ten times a second: those that lose a
rank then have the time to say which. It waits for a checkpoint before it kills those that it has
asked to end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastdml.errors import InputError
from fastdml.host import cpus
from fastdml.parallel.failure import TOLD, signal_name

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

INTERVAL = 2.0  # seconds between looks at the processes
SAVING = 30.0  # seconds that ranks have at least to save and end after a signal


def check_devices(device: str, ranks: int, mesh: str) -> None:
    """Raises InputError where this machine lacks GPUs for a mesh, which is named."""
    kind, _, number = device.partition(":")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return
    if number and ranks > 1:
        raise InputError(
            f"device {device} is one GPU, and --mesh {mesh} takes {ranks}: leave --device out"
        )
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < ranks:
        raise InputError(
            f"--mesh {mesh} takes {ranks} GPUs, and torch finds {there} here: take a smaller mesh, "
            "start torchrun on several machines, or say --device cpu"
        )


def ranks_here(device: str, peers: int) -> int:
    """How many ranks --mesh auto takes on this machine: one a GPU; without, one a peer while there
    are cores."""
    if device != "cpu" and torch.cuda.is_available():
        return 1 if ":" in device else torch.cuda.device_count()
    return max(1, min(peers, cpus()))


def launch(
    command: Sequence[str], ranks: int, max_restarts: int = 0, timeout: float = 300.0
) -> int:
    """Runs a command, such as ["python", "train.py"], on so many ranks, and returns the exit code:
    0; 2 where a rank ended so; 128 + the number of a signal that ended the job; else 1.

    max_restarts: how often all ranks are started again after one has failed. While they run a
    SIGUSR1 to this process reaches one of them. timeout: seconds that ranks wait for each other;
    those that do not end after a signal, or after another has failed, are killed after as long, at
    the least after `SAVING`, by torch 2.11 after 30.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(max(SAVING, timeout))))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // ranks)))
    _quieten()
    # The agent's own store, as a process has one server a port, and notes can be read at the end.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{store.port}",
        rdzv_configs={"rank": 0},
        max_restarts=max_restarts,
        monitor_interval=INTERVAL,
    )
    program, *arguments = command
    try:
        with _saving_on_request():
            elastic_launch(config, program)(*arguments)
        return 0
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        # torchrun gives up after the last attempt, whatever those before it have said.
        if not store.check([f"fastdml/{TOLD}/0/{max_restarts}"]):
            print(f"fastdml: error: {_line(error.failures)}", file=sys.stderr)
        return exit_code(failure.exitcode for failure in error.failures.values())


@contextlib.contextmanager
def _saving_on_request() -> Iterator[None]:
    """Passes SIGUSR1, which would end the agent and with it the job, to a rank; one that is ignored
    stays so. (Only the main thread can have it so.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGUSR1)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda *_: ask_to_save(_children()))
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, before)


def ask_to_save(processes: Iterable[int]) -> int | None:
    """Sends SIGUSR1 to the first process that handles it, and returns its number. None: nobody
    does, as before the ranks train, when there is nothing to save and it would end them."""
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGUSR1 - 1) & 1:
                os.kill(process, signal.SIGUSR1)
                return process
    return None


def _children() -> list[int]:
    threads = Path("/proc/self/task").glob("*/children")
    return [int(number) for of in threads for number in of.read_text(encoding="utf-8").split()]


def exit_code(codes: Iterable[int]) -> int:
    """Of a job whose ranks ended so, those killed by a signal with its number below 0."""
    found = {*codes}
    of_signals = sorted(code for code in found if code > 128)  # saved, and ended by themselves
    return 2 if 2 in found else of_signals[0] if of_signals else 1


def _line(failures: dict[int, ProcessFailure]) -> str:
    """What the agent knows of ranks that ended, all at once, before any could say why."""
    rank = min(failures, key=lambda rank: (failures[rank].timestamp, rank))
    code = failures[rank].exitcode
    what = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
    others = len(failures) - 1
    return f"rank {rank} {what}" + (f", and {others} more" if others else "")


def _quieten() -> None:
    """Has torchrun's agent log nothing: what a user should know, the ranks say."""
    loggers: dict[str, Any] = logging.root.manager.loggerDict
    for name in [*loggers]:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
