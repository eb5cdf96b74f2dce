"""What bench/gpu-tests.sh and bench/gpu-bench.sh do: run pytest within a time limit, keep what it
found until then, and say what it did not come to.

The files in OUT, at most eight: log.txt, tests.jsonl or benchmarks.jsonl (a line for each result,
written as soon as it is known), and of benchmarks results for bench/results and roofline.png.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import gpu_order, gpu_summary, report

ROOT = Path(__file__).resolve().parents[1]
# Seconds: nothing is started any more; what runs is interrupted; and killed. What is left of nine
# minutes is for the import of torch before, and for the tables after.
LIMITS = {"tests": (450, 500, 512), "bench": (460, 500, 512)}
PROCESSES = 16  # of tests at most: each holds a context and a cache of its own on the device


def command(what: str, arguments: argparse.Namespace, stored: Path, until: float) -> list[str]:
    """The call of pytest."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider"]
    pytest += ["-p", "bench.gpu_plugin", "--stored", str(stored), "--until", str(until)]
    pytest += ["--continue-on-collection-errors"]
    if arguments.dry_run:
        pytest.append("--dry-run")
    if arguments.again:
        pytest += ["--again", str(arguments.again.resolve())]
    if what == "tests":
        processes = 1 if arguments.dry_run else min(len(os.sched_getaffinity(0)), PROCESSES)
        # one at a time to whoever is free: in the order that they are in
        pytest += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "1"]
    else:
        pytest += ["--device", "cuda"]
    named = any((ROOT / each.split("::")[0]).exists() for each in arguments.rest)
    if not named:
        pytest += gpu_order.files(ROOT) if what == "tests" else ["bench"]
    return pytest + arguments.rest


def environment(what: str, dry_run: bool) -> dict[str, str]:
    added: dict[str, str] = {}
    if what == "tests":  # as many processes as cores; a thread that waits sleeps
        added |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        added["OMP_WAIT_POLICY"] = "PASSIVE"
    if dry_run:
        added |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added}


def run(call: list[str], env: dict[str, str], log: Path, interrupt: float, kill: float) -> None:
    """Runs `call` in a process group of its own; interrupts it, then kills the group, at these
    times (Unix seconds)."""
    with log.open("w") as file:
        process = subprocess.Popen(
            call, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for at, number in ((interrupt, signal.SIGINT), (kill, signal.SIGKILL)):
                try:
                    process.wait(max(at - time.time(), 0.0))
                    break
                except subprocess.TimeoutExpired:
                    if number == signal.SIGINT:
                        process.send_signal(number)  # pytest ends its processes itself
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def keep(again: Path, stored: Path) -> Path:
    """Where the results of an earlier run are while `stored` is written: it may be the same."""
    if again.resolve() != stored:
        return again
    return stored.rename(stored.with_name("earlier-" + stored.name))


def tables(files: list[Path], out: Path) -> None:
    """Prints the benchmarks' tables and draws the roofline, where there is something to draw and
    something to draw with."""
    by_machine = report.by_machine(map(str, files))
    print("\n\n".join(report.tables(rows, where) for where, rows in by_machine.items()))
    for where, rows in by_machine.items():
        try:
            report.roofline(rows, where, str(out / "roofline.png"))
        except ImportError as error:
            print(f"no roofline.png: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("what", choices=("tests", "bench"))
    parser.add_argument("out", metavar="OUT", help="a folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, quickly")
    parser.add_argument("--again", metavar="FILE", help="only what did not pass in this .jsonl")
    arguments, arguments.rest = parser.parse_known_args()
    start = time.time()
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA device; --dry-run does without one")
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    what = arguments.what
    stored = out / ("tests.jsonl" if what == "tests" else "benchmarks.jsonl")
    earlier = gpu_summary.Stored()
    if arguments.again:
        earlier = gpu_summary.read(arguments.again)
        arguments.again = keep(Path(arguments.again), stored)
    until, interrupt, kill = (start + limit for limit in LIMITS[what])
    run(
        command(what, arguments, stored, until), environment(what, arguments.dry_run),
        out / "log.txt", interrupt, kill,
    )  # fmt: skip
    if not stored.exists():  # pytest did not get that far
        print((out / "log.txt").read_text()[-3000:])
        return 1
    found = gpu_summary.read(stored)
    if earlier.machine == found.machine:
        found.benchmarks[:0] = earlier.benchmarks
    if what == "bench" and (files := gpu_summary.write_results(found, out)):
        tables(files, out)
    print(gpu_summary.text(found))
    print(f"{time.time() - start:.0f} s; the whole output is in {out / 'log.txt'}")
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
