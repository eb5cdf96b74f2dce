"""The C compiler, which the native loss of a CPU is built with, and Triton's launches on a GPU."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

PYTHON_H = "#include <Python.h>\nint fastdml_probe(void) { return PY_MAJOR_VERSION; }\n"
NO_HEADER = "int fastdml_probe(void) { return 3; }\n"


class Compiler(NamedTuple):
    name: str  # the first line that it says of itself
    works: bool
    headers: bool  # whether it finds Python's, which Triton's launches need
    failure: str


def compiler() -> Compiler | None:
    """What CC names, else gcc, clang or cc; None where there is none."""
    named = os.environ.get("CC", "")
    try:
        command = shlex.split(named)
    except ValueError as error:  # a quotation that does not end
        return Compiler(f"CC={named}", False, False, str(error))
    command = command or [c for c in ("gcc", "clang", "cc") if shutil.which(c)][:1]
    if not command:
        return None
    if shutil.which(command[0]) is None:
        return Compiler(command[0], False, False, "CC names no program")
    first = _run([*command, "--version"]).stdout.splitlines()[:1]
    name = first[0] if first else command[0]
    with_headers = _compiles(command, PYTHON_H)
    if not with_headers:
        return Compiler(name, True, True, "")
    plain = _compiles(command, NO_HEADER)
    return Compiler(name, not plain, False, plain or with_headers)


def _compiles(command: list[str], source: str) -> str:
    """ "" or the first error of the compiler."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return "no folder for temporary files can be written to"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.c")
        path.write_text(source)
        include = sysconfig.get_paths()["include"]
        done = _run(
            [*command, "-shared", "-fPIC", f"-I{include}", str(path), "-o", f"{folder}/probe.so"]
        )
    if done.returncode == 0:
        return ""
    said = [line for line in done.stderr.splitlines() if "error" in line]
    return (said or done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", f"error: {type(error).__name__}")
