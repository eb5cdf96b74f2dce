"""The jobs that `warm` runs in a fork: commands with closed streams, dead workers, signals, full
disks. Arguments come as JSON."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from typing import Any

from warm import command_without_pictures


def with_streams(request: dict[str, Any]) -> int:
    """streams: of stdin, stdout and stderr, by number, what is there: "closed", "full", or "gone",
    where nobody reads on."""
    for number, what in request["streams"].items():
        number = int(number)
        name, mode = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))[number]
        if what == "closed":
            os.close(number)
            setattr(sys, name, None)  # as Python starts
            continue
        if what == "full":
            opened = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, opened = os.pipe()
            os.close(reader)
        os.dup2(opened, number)
        os.close(opened)
        setattr(sys, name, os.fdopen(number, mode, 1 if number == 2 else -1, closefd=False))
    return command_without_pictures(request["arguments"])


def with_dead_workers(request: dict[str, Any]) -> int:
    """All loading processes get the signal `number` when so many batches were taken."""
    from fastdml.data import TorchLoader

    finished, left = TorchLoader._finished, iter(range(request["after"], -1, -1))

    def kill(loader: Any, *arguments: Any) -> Any:
        if next(left, None) == 0:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, request["number"])
        return finished(loader, *arguments)

    TorchLoader._finished = kill
    return command_without_pictures(request["arguments"])


def interrupted_saving(request: dict[str, Any]) -> int:
    """Within checkpoint number `save`, before the writes `at`, signals arrive: this process's own,
    or "worker", by which a loading process is killed."""
    import torch

    def send(what: int | str) -> None:
        if what != "worker":
            os.kill(os.getpid(), what)
            return
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(10)  # until SIGCHLD, whose handler raises

    class File:
        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, data: Any) -> int:
            self.writes += 1
            for what in request["at"].get(str(self.writes), ()):
                send(what)
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    save, left = torch.save, iter(range(request["save"], -1, -1))
    torch.save = lambda state, file: save(state, File(file) if next(left, None) == 0 else file)
    return command_without_pictures(request["arguments"])


def with_small_files(request: dict[str, Any]) -> int:
    """Files cannot grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    return command_without_pictures(request["arguments"])
