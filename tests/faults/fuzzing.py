"""Feeds a parser inputs made from a seed, in a process of its own.

An input works or is refused by one of the errors that the parser documents, in a short line; it
takes no more than `PATIENCE`, needs no more than `MEMORY`, and touches no file but its own. Input n
of a seed is always the same one: a failure names both.

    python tests/faults/fuzzing.py --seconds 3600 --seed 7
    python tests/faults/fuzzing.py --target images --seed 7 --only 123
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from warm import Warm

PATIENCE = 10  # seconds an input
MEMORY = 4 << 30  # bytes beyond what the imports take
SHOWN = 5  # failures in full
LONGEST, LINES = 5000, 3  # of a message; names may hold line ends, which the command joins

Check = Callable[[Random], None]  # makes one input and feeds it


@dataclass(frozen=True)
class Target:
    """prepare: gets an empty folder for the input's files. refuses: what it may raise."""

    prepare: Callable[[Path], Check]
    refuses: tuple[type[Exception], ...]


class Hung(BaseException):
    pass


def fuzz(arguments: dict[str, Any]) -> int:
    """Job of a `Warm`: `count` inputs of a target, from `first` on; prints what came out wrong."""
    from fuzz_targets import TARGETS

    target = TARGETS[arguments["target"]]
    here = Path.cwd()
    for name in ("files", "home", "elsewhere"):
        (here / name).mkdir()
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(here / "home")
    os.chdir(here / "elsewhere")
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _hang)
    check = target.prepare(here / "files")
    before = set(os.listdir(here))
    wrong = 0
    for n in range(arguments["first"], arguments["first"] + arguments["count"]):
        (here / "at").write_text(str(n))
        said = _one(check, Random(f"{arguments['seed']}/{n}"), target.refuses)
        strays = {*os.listdir(here)} - before - {"at"} | {*os.listdir(here / "elsewhere")}
        if strays:
            said = f"left {sorted(strays)} behind"
        if said:
            wrong += 1
            if wrong <= SHOWN:
                print(f"input {n}: {said}")
    print(f"{wrong} wrong")
    return bool(wrong)


def _hang(*_: object) -> None:
    raise Hung


def _one(check: Check, random: Random, refuses: tuple[type[Exception], ...]) -> str | None:
    signal.alarm(PATIENCE)
    try:
        check(random)
    except refuses as error:
        message = str(error)
        if not message.strip() or message.count("\n") >= LINES or len(message) > LONGEST:
            return f"{type(error).__name__} is not a short line: {message!r:.2000}"
    except (Exception, Hung, SystemExit):
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def run(
    warm: Warm, folder: Path, target: str, seed: int, number: int, first: int = 0
) -> str | None:
    """What came out wrong of `number` inputs, None if nothing; `folder` is made for them."""
    folder.mkdir()
    arguments = {"target": target, "seed": seed, "first": first, "count": number}
    log = folder.with_suffix(".log")
    ended = warm.run("fuzzing.fuzz", arguments, log, cwd=folder, limit=60 + number)
    if ended.code == 0:
        return None
    at = folder / "at"
    reached = f"at input {at.read_text()}" if at.exists() else "before the first input"
    how = "hung" if ended.hung else f"ended with {ended.code}"
    return f"{target}, seed {seed}: {how} {reached}: {ended.output[-6000:]}"


def main() -> int:
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--only", type=int, metavar="N", help="this input alone")
    parser.add_argument("--count", type=int, default=100, help="inputs of a target at a time")
    options = parser.parse_args()
    number = options.count if options.only is None else 1
    end, wrong, inputs = time.monotonic() + options.seconds, 0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, Warm() as warm:
        targets = options.target or TARGETS
        for seed, name in ((options.seed + turn, name) for turn in count() for name in targets):
            print(f"{name}, seed {seed}", flush=True)
            found = run(
                warm, Path(folder) / f"{name}-{seed}", name, seed, number, options.only or 0
            )
            inputs += number
            if found:
                print(found, flush=True)
                wrong += 1
            if options.only is not None or time.monotonic() > end:
                break
    print(f"{inputs:,} inputs; {wrong} times something came out wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
