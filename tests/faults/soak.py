"""Breaks runs for as long as it is told: `make soak SECONDS=3600 SEED=7`.

Rounds of random kills, and between them every file event of a run in turn, in random order: killed
there, killed with what is not synced, or without room on the disk. Says what came out wrong, with
the seed that shows it again, and leaves those folders.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from itertools import chain, count
from pathlib import Path
from random import Random

from recovery import Recovery, at_events, compile_events, outcome, random_kills
from warm import Warm

KILLS, EVENTS = 20, 50  # a round


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    end = time.monotonic() + options.seconds
    wrong = 0
    with Warm(compile_events(folder)) as warm:
        drawn = Recovery(warm, folder / "drawn")
        seconds = drawn.go().seconds
        expected = outcome(drawn.folder)
        whole = Recovery(warm, folder / "whole", "command_without_pictures")
        whole.at_event("count", -1)
        undrawn, events = outcome(whole.folder), range(len(whole.events()))
        order = Random(options.seed).sample(events, len(events))
        for turn in count():
            if time.monotonic() > end:
                break
            seed = options.seed + turn
            start = turn * EVENTS % len(order)
            print(f"seed {seed}: {KILLS} kills, {EVENTS} of {len(order)} events", flush=True)
            here = folder / f"seed-{seed}"
            here.mkdir()
            numbers = order[start : start + EVENTS]
            found = [random_kills(warm, here, expected, seconds, Random(seed), KILLS)]
            for mode in ("kill", "power", "full"):
                found.append(at_events(warm, here, undrawn, mode, numbers, whole.job))
            for line in chain(*found):
                print(line, flush=True)
                wrong += 1
    print(f"{wrong} came out wrong" + (f": see {folder}" if wrong else ""))
    if not wrong:
        shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
