"""What the GPU scripts stored: how every test ended, and the benchmarks as files for
`bench/results`.

A file may have been cut off at any place, where the machine was taken away.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stored:
    collected: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)  # what stands above the benchmarks
    machine: str = ""
    finished: bool = False  # the last run of pytest came to its end

    @property
    def passed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}

    def ended(self, *outcomes: str) -> list[str]:
        return [test for test, outcome in self.outcomes.items() if outcome in outcomes]

    @property
    def cut_off(self) -> list[str]:
        """Tests that had begun when it ended."""
        return [test for test in self.started if test not in self.outcomes]

    @property
    def not_run(self) -> list[str]:
        never = [test for test in self.collected if self.outcomes.get(test, "") in ("", "not run")]
        return [test for test in never if test not in self.cut_off]

    @property
    def good(self) -> bool:
        """Everything was run, and nothing failed."""
        bad = self.ended("failed") or self.cut_off or self.not_run
        return bool(self.collected) and not bad


def _lines(path: str | Path, first: int | None = None) -> Iterator[dict[str, Any]]:
    for line in Path(path).read_text().splitlines()[:first]:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # cut off, where the writer was stopped
            continue
        if isinstance(found, dict):
            yield found


def read(path: str | Path, first: int | None = None) -> Stored:
    """What the file holds, or its `first` lines do."""
    found = Stored()
    for line in _lines(path, first):
        if "collected" in line:
            found.collected = list(dict.fromkeys(found.collected + line["collected"]))
        elif "started" in line:
            found.started.append(line["started"])
        elif "benchmark" in line:
            found.benchmarks.append(line["benchmark"])
        elif "machine_info" in line:
            found.info = line
        elif "machine" in line:
            if line["machine"] != found.machine:  # what another device did is not in its files
                found.benchmarks.clear()
            found.machine, found.finished = line["machine"], False
        elif "finished" in line:
            found.finished = True
        elif "test" in line and found.outcomes.get(line["test"]) != "failed":
            found.outcomes[line["test"]] = line["outcome"]
            found.texts[line["test"]] = line.get("text", "")
            found.seconds[line["test"]] = line.get("seconds", 0.0)
    return found


def passed_lines(path: str | Path) -> list[str]:
    """The lines about the tests that passed, with which another run's file begins."""
    passed = read(path).passed
    kept: list[dict[str, Any]] = []
    for line in _lines(path):
        test = line.get("test", line.get("benchmark", {}).get("fullname"))
        if "machine" in line or "machine_info" in line or test in passed:
            kept.append(line)
        elif "collected" in line:
            kept.append({"collected": [test for test in line["collected"] if test in passed]})
    return [json.dumps(line) for line in kept]


def died(test: str, seconds: float = 0.0, longest: float | None = None) -> dict[str, Any]:
    """The line for a test that took its process with it."""
    why = "its process died"
    if longest and seconds >= longest:
        why = f"it took longer than {longest:.0f} s"
    text = f"E   {why}: log.txt has what it wrote, and where each thread was"
    return {"test": test, "outcome": "failed", "seconds": round(seconds, 3), "text": text}


def text(stored: Stored) -> str:
    """How it ended: what failed and why, what was skipped, and what was not run."""
    counts = Counter(stored.outcomes.values())
    del counts["not run"]
    head = [f"{number} {outcome}" for outcome, number in sorted(counts.items())]
    lines = []
    for test in stored.ended("failed"):
        reasons = [x for x in stored.texts[test].splitlines() if x.startswith("E ")]
        last = (stored.texts[test].strip().splitlines() or [""])[-1]
        lines += [f"FAILED {test}", *(reasons[:3] or [f"  {last}"])]
    for reason, number in Counter(stored.texts[t] for t in stored.ended("skipped")).items():
        lines.append(f"skipped ({number}): {reason.splitlines()[0] if reason else ''}"[:160])
    for test in stored.cut_off:
        lines.append(f"CUT OFF {test}")
    if stored.not_run:
        head.append(f"{len(stored.not_run)} not run")
        groups = Counter(re.sub(r"\[.*", "", test) for test in stored.not_run)
        lines += [f"NOT RUN {test} ({number})" for test, number in groups.items()]
    if not stored.collected:
        lines.append("nothing was collected")
    slowest = sorted(stored.seconds, key=lambda test: -stored.seconds[test])[:5]
    lines += [f"{stored.seconds[test]:.1f} s {test}" for test in slowest]
    return "\n".join([*lines, ", ".join(head) or "no test ended"])


def device_name(machine: str) -> str:
    """A machine's line as part of a file's name: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", machine.split(",")[0].lower()).strip("-")


def write_results(stored: Stored, folder: Path) -> list[Path]:
    """A JSON file as pytest-benchmark's for each file of benchmarks, named after the device."""
    by_file: dict[str, list[dict[str, Any]]] = {}
    for each in stored.benchmarks:
        name = Path(each["fullname"].split("::")[0]).stem.removeprefix("bench_")
        by_file.setdefault(name, []).append(each)
    written = []
    for name, benchmarks in by_file.items():
        where = device_name(stored.info["machine_info"]["fastdml"])
        path = folder / f"{name}-{where}.json"
        path.write_text(json.dumps({**stored.info, "benchmarks": benchmarks}, indent=4) + "\n")
        written.append(path)
    return written
