"""A small job for tests of the launcher, and what it prints: python jobs.py HOW TIMEOUT RESTARTS.

Under a launcher it is a rank of a 1 x N mesh, whose last rank fails in the first attempt; otherwise
it starts two of them.
"""

from __future__ import annotations

import os
import signal
import sys
import time

STEPS, EVENT = 6, 3


def rank(args: list[str]) -> int:
    import torch
    import torch.distributed as dist

    from fastdml.parallel import make_mesh
    from fastdml.parallel.failure import explained

    how, timeout = args[0], float(args[1])
    mesh = make_mesh(1, int(os.environ["WORLD_SIZE"]), timeout=timeout)
    mesh.place(1)
    if mesh.job_store is not None:
        mesh.job_store.add("starts", 1)
    with explained(mesh):
        for step in range(STEPS):
            if step == EVENT and mesh.rank == mesh.world - 1 and mesh.attempt == 0:
                fail(how)
            dist.all_reduce(torch.ones(1), group=mesh.data_group)
    print(f"attempt {mesh.attempt} rank {mesh.rank} of {mesh.world} done", flush=True)
    dist.destroy_process_group()
    return 0


def command(args: list[str]) -> int:
    from fastdml.errors import InputError

    try:
        return rank(args)
    except InputError as error:
        line = f"fastdml: error: {ranks.line_of(error)}"
        if ranks.speaks(line):
            print(line, file=sys.stderr)
        return 2


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":  # as a rank that listens to SIGTERM and never gets to act on it
        signal.signal(signal.SIGTERM, lambda *_: None)
        time.sleep(1000)
    if how == "raise":
        raise ValueError("no such image")
    if how == "input":
        from fastdml.errors import InputError

        raise InputError("labels must be below 10")
    if how == "die":
        os.kill(os.getppid(), signal.SIGKILL)


if __name__ == "__main__":
    from fastdml.cli import ranks

    if ranks.started():
        sys.exit(ranks.run(command, sys.argv[1:]))
    from fastdml.parallel.launch import launch

    sys.exit(launch([sys.executable, *sys.argv], 2, max_restarts=int(sys.argv[3])))
