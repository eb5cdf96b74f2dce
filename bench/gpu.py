"""What bench/gpu-tests.sh and bench/gpu-bench.sh do: run pytest within a time limit, keep what it
found until then, and say what it did not come to.

The files in OUT, at most eight: log.txt, tests.jsonl or benchmarks.jsonl (a line for each result,
written as soon as it is known), and of benchmarks results for bench/results and roofline.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
# Seconds for one test, cold compilation included: after them it counts as hung.
LONGEST = {"tests": 120, "bench": 150}
STOPPED = 130  # the exit code where somebody stopped the script
PROCESSES = 16  # of tests at most: each holds a context and a cache of its own on the device


def command(
    what: str, arguments: argparse.Namespace, stored: Path, done: int, until: float
) -> list[str]:
    """The call of pytest. What ended in the first `done` lines of `stored` is not run."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider"]
    pytest += ["-p", "bench.gpu_plugin", "--stored", str(stored), "--done", str(done)]
    pytest += ["--until", str(until), "--longest", str(LONGEST[what])]
    pytest += ["--continue-on-collection-errors"]
    if arguments.dry_run:
        pytest.append("--dry-run")
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
    # A worker of pytest-xdist may run this; in what runs here pytest-benchmark must not take itself
    # for one, where it measures nothing.
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return own | added


def run(call: list[str], env: dict[str, str], log: Path, interrupt: float, kill: float) -> bool:
    """Runs `call` in a process group of its own; interrupts it, then kills the group, at these
    times (Unix seconds), or where somebody interrupts this process. Whether it ended by itself."""
    by_itself = False
    with log.open("a") as file:
        process = subprocess.Popen(
            call, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(interrupt - time.time(), 0.0))
                by_itself = True
        finally:
            try:
                if not by_itself:
                    process.send_signal(signal.SIGINT)  # pytest ends its processes itself
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(max(kill - time.time(), 0.0), kill - interrupt))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return by_itself


def begin(stored: Path, again: str | None) -> None:
    """A file of results with what passed in `again`, which may be the same file."""
    lines = gpu_summary.passed_lines(again) if again else []
    draft = stored.with_name(stored.name + ".draft")
    draft.write_text("".join(line + "\n" for line in lines))
    draft.replace(stored)


def run_all(what: str, arguments: argparse.Namespace, stored: Path, start: float) -> None:
    """Runs pytest, and once more without what ended each time that its process died."""
    until, interrupt, kill = (start + limit for limit in LIMITS[what])
    log = stored.with_name("log.txt")
    log.write_text("")
    env = environment(what, arguments.dry_run)
    while time.time() < until:
        lines = stored.read_text().splitlines()
        call = command(what, arguments, stored, len(lines), until)
        by_itself = run(call, env, log, interrupt, kill)
        found = gpu_summary.read(stored)
        if (
            found.finished
            or not by_itself
            or not (
                found.cut_off
                or len(found.outcomes) > len(gpu_summary.read(stored, len(lines)).outcomes)
            )
        ):
            return
        with stored.open("a") as file:
            for test in found.cut_off:
                file.write(json.dumps(gpu_summary.died(test)) + "\n")


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


def checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Path:
    """The folder OUT, which can be written to; ends with one line where an argument is wrong."""
    out = Path(arguments.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").open("a").close()
    except OSError as error:
        parser.error(f"OUT: cannot write to {out}: {error.strerror}; give a folder")
    if arguments.again:
        try:
            known = gpu_summary.read(arguments.again).collected
        except (OSError, ValueError) as error:
            parser.error(f"--again: cannot read {arguments.again}: {error}")
        if not known:
            parser.error(f"--again: {arguments.again} has no results: give a tests.jsonl or "
                         "benchmarks.jsonl of an earlier run")  # fmt: skip
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-tests.sh, gpu-bench.sh", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options and names of files go to pytest.",
    )  # fmt: skip
    parser.add_argument("what", choices=("tests", "bench"), help="given by the script")
    parser.add_argument("out", metavar="OUT", help="a folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, quickly")
    parser.add_argument("--again", metavar="FILE", help="only what did not pass in this .jsonl")
    parser.add_argument(
        "--summary", action="store_true", help="run nothing: what OUT's .jsonl has, cut off or not"
    )
    arguments, arguments.rest = parser.parse_known_args()
    start = time.time()
    if not (arguments.dry_run or arguments.summary or torch.cuda.is_available()):
        parser.error("no CUDA device; --dry-run does without one")
    out = checked(parser, arguments)
    what = arguments.what
    stored = out / ("tests.jsonl" if what == "tests" else "benchmarks.jsonl")
    stopped = False
    if not arguments.summary:
        begin(stored, arguments.again)
        for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what is known is told
            signal.signal(number, signal.default_int_handler)
        try:
            run_all(what, arguments, stored, start)
        except KeyboardInterrupt:
            stopped = True
    elif not stored.exists():
        parser.error(f"--summary: there is no {stored}")
    found = gpu_summary.read(stored)
    if not found.collected and not arguments.summary:  # pytest did not get that far
        print((out / "log.txt").read_text()[-3000:])
    if what == "bench" and (files := gpu_summary.write_results(found, out)):
        tables(files, out)
    print(gpu_summary.text(found))
    print(f"{time.time() - start:.0f} s; the whole output is in {out / 'log.txt'}")
    return STOPPED if stopped else 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
