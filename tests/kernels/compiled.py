"""Code that runs where Triton compiles kernels, which it does not under its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_code(
    code: str, *arguments: Any, interpret: bool = False, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """`code` in a process of its own, with or without the interpreter; arguments: `sys.argv[1:]`,
    each as JSON. timeout: seconds."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(json.dumps, arguments)],
        capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)),
             "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def printed_by(code: str, *arguments: Any) -> list[Any]:
    """What `code` prints without the interpreter, each line from JSON. It must not fail."""
    done = run_code(code, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
