"""Builds the CPU's native loss with sanitizers, and runs it over random problems with each width of
vectors that the processor has: `make sanitize SECONDS=600`.

address     what reads or writes beyond a tensor's last value, and what C leaves undefined
thread      threads that touch the same bytes
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "kernels" / "fastdml_kernels"
OPTIONS = ["-g", "-O0", "-std=gnu11", "-Wno-psabi", "-pthread", "-fno-sanitize-recover=all"]
BUILDS = {"address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}


def available(folder: Path, build: str) -> bool:
    """Whether the compiler has the sanitizer and what it makes starts here."""
    source = folder / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    made = _compile([source], folder / "nothing", build)
    return made.returncode == 0 and subprocess.run([folder / "nothing"]).returncode == 0


def driver(folder: Path, build: str) -> Path:
    program = folder / f"rows_{build}"
    made = _compile([HERE / "rows_driver.c", *NATIVE.glob("cpu_rows*.c")], program, build)
    if made.returncode:
        raise RuntimeError(made.stderr)
    return program


def _compile(sources: list[Path], program: Path, build: str) -> subprocess.CompletedProcess:
    command = ["cc", *OPTIONS, *BUILDS[build], *map(str, sources), "-o", str(program), "-lm"]
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def problems(program: Path, seed: int, number: int) -> str | None:
    """What was wrong with that many problems of a seed, None if nothing."""
    done = subprocess.run([program, str(seed), str(number)], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return f"{program.name}, seed {seed}: ended with {done.returncode}: {done.stderr[:4000]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        builds = [build for build in BUILDS if available(Path(folder), build)]
        for build in BUILDS.keys() - builds:
            print(f"{build}: the compiler here has no such sanitizer")
        programs = [driver(Path(folder), build) for build in builds]
        for turn in count():
            for program in programs:
                print(f"{program.name}, seed {options.seed + turn}", flush=True)
                wrong = problems(program, options.seed + turn, 500)
                if wrong:
                    print(wrong)
                    return 1
            if time.monotonic() > end or not programs:
                return not programs


if __name__ == "__main__":
    sys.exit(main())
