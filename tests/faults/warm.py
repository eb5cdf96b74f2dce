"""A process that has imported everything and forks: a command in milliseconds instead of seconds.

    with Warm() as warm:
        ended = warm.run("command", ["train", "digits"], log=path, kill_after=0.3)

What is forked is a process of its own and ends by itself, by a signal or at its time limit, as the
command would. The server has a single thread, no CUDA and nothing in its hands but the imports.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 120.0  # seconds that no job needs
SIGKILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    code: int  # as of subprocess: below 0 the signal that ended it
    seconds: float
    hung: bool  # it was at its time limit, and was killed
    output: str  # stdout and stderr as they came


class Warm:
    """The server as its client sees it. preload: a shared object that it starts with."""

    def __init__(self, preload: Path | None = None) -> None:
        path = [str(HERE), str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]
        own = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        if preload:
            own["LD_PRELOAD"] = str(preload)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "warm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **own, "CUDA_VISIBLE_DEVICES": ""},
            text=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(
        self,
        job: str,
        arguments: Any,
        log: Path,
        *,
        cwd: Path | None = None,
        kill_after: float | None = None,
        by: int = signal.SIGKILL,
        arm: dict[str, Any] | None = None,
        limit: float = LIMIT,
    ) -> Ended:
        """Runs `module.job(arguments)`, or `job` of this module, in a fork; its output is in `log`.

        kill_after: seconds until the signal `by`. arm: what `arm` of events.c is told.
        """
        request = {
            "job": job,
            "arguments": arguments,
            "log": str(log),
            "cwd": str(cwd or log.parent),
            "kill_after": kill_after,
            "by": by,
            "arm": arm,
            "limit": limit,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of forks died: {self.process.wait()}")
        return Ended(**json.loads(answer), output=log.read_text(errors="replace"))


def command(arguments: list[str]) -> int:
    """The command line, as `python -m fastdml` has it."""
    from fastdml.cli import main

    return main(arguments)


def command_without_pictures(arguments: list[str]) -> int:
    """The same in a third of the time."""
    from fastdml.report import plots

    plots.draw = lambda folder, headlines, formats: []
    return command(arguments)


def command_unsynced(arguments: list[str]) -> int:
    """The same, and nothing is forced to disk, as the product must not be."""
    os.fsync = lambda file: None
    return command_without_pictures(arguments)


def _prepare() -> None:
    """All that a run imports, and what makes its first step and its first picture slow."""
    import matplotlib.pyplot
    import safetensors.torch
    import sklearn.datasets
    import torch
    import tqdm
    import tyro
    import yaml
    from torch.utils import tensorboard

    import fastdml.cli
    import fastdml.train.run

    assert all((matplotlib, safetensors, sklearn, tqdm, tyro, yaml, tensorboard, fastdml))
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # imports much of torch
    figure, axes = matplotlib.pyplot.subplots()
    axes.set_title("fonts")
    figure.savefig(os.devnull, format="png")
    matplotlib.pyplot.close(figure)


def _serve() -> None:
    _prepare()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        request = json.loads(line)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            requests.close()
            answers.close()
            _become(request)
        killed, limit = request["kill_after"], request["limit"]
        if killed is not None and request["by"] != signal.SIGKILL:
            _signal(child, killed, request["by"])
            killed = None
        status, hung = _wait(child, limit if killed is None else killed)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - start,
            "hung": hung and killed is None,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(child: int, seconds: float) -> tuple[int, bool]:
    """The status of a child, which is killed after so long, and whether it was."""
    handle = os.pidfd_open(child)
    late = not select.select([handle], [], [], seconds)[0]
    if late:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    return os.waitpid(child, 0)[1], late


def _signal(child: int, seconds: float, number: int) -> None:
    """Sends it after so long, unless the child has ended."""
    handle = os.pidfd_open(child)
    if not select.select([handle], [], [], seconds)[0]:
        os.kill(child, number)
    os.close(handle)


def _become(request: dict[str, Any]) -> None:
    """The forked process: never returns."""
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", closefd=False),
            os.fdopen(2, "w", 1, closefd=False),
        )
        os.chdir(request["cwd"])
        module, _, name = request["job"].rpartition(".")
        job = getattr(importlib.import_module(module) if module else sys.modules[__name__], name)
        if request["arm"]:
            _arm(**request["arm"])
        code = job(request["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with open(os.devnull, "w") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError as error:
                    nowhere.write(str(error))
        os._exit(code)


def _arm(folder: str, mode: str, at: int, log: str) -> None:
    events = ctypes.CDLL(os.environ["LD_PRELOAD"])
    events.arm(os.fsencode(folder), mode.encode(), ctypes.c_long(at), os.fsencode(log))


if __name__ == "__main__":
    _serve()
