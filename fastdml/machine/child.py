"""Work in a Python of its own: what crashes there, or never ends, is reported here.

The work is a module's function `rows(arguments)`, which yields plain dicts. Each comes over as soon
as it is there, so that the rows before a crash are known, and with them where it happened.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

# The child finds the packages that this process finds, whatever it was started by.
CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastdml.machine.child import serve; serve(sys.argv[2], sys.argv[3:])"
)


class Rows(NamedTuple):
    rows: list[dict[str, Any]]
    failure: str | None  # why there are no more of them; None: these are all


def run(module: str, arguments: Sequence[str], seconds: float) -> Rows:
    """The rows of `module.rows(arguments)`, which gets so many seconds."""
    command = [sys.executable, "-c", CODE, json.dumps(sys.path), module, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        return Rows(_parsed(late.stdout or b""), f"no answer in {seconds:g} s")
    except OSError as error:
        return Rows([], f"cannot start {sys.executable}: {error.strerror}")
    failure = None
    if done.returncode < 0:
        failure = f"killed by {signal.Signals(-done.returncode).name}"
    elif done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        failure = said[-1].strip()[:300] if said else f"exit code {done.returncode}"
    return Rows(_parsed(done.stdout), failure)


def _parsed(output: bytes) -> list[dict[str, Any]]:
    """The complete lines: of a child that was killed the last may be cut off."""
    return [json.loads(line) for line in output.split(b"\n")[:-1]]


def serve(module: str, arguments: Sequence[str]) -> None:
    """The child's side: rows go to stdout, and what anything prints there to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for row in importlib.import_module(module).rows(arguments):
            print(json.dumps(row), file=out, flush=True)
