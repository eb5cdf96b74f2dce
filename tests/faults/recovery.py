"""Runs that are broken and resumed, compared bit for bit with a run that nothing broke."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from warm import HERE, SIGKILLED, Ended, Warm

SETTINGS = [
    "train", "digits", "--peers", "resnet8", "resnet8", "--subset", "128", "--batch-size", "32",
    "--epochs", "2", "--independent", "--save-every-steps", "3", "--log-every", "2",
    "--device", "cpu", "--execution", "eager", "--threads", "1", "--amp", "off",
]  # fmt: skip
TIMES = ("time", "date", "seconds", "wall_seconds", "images_per_second", "data_wait", "clock")
PLACES = ("command", "folder", "weights", "resume")  # of settings and summaries


def compile_events(folder: Path) -> Path:
    """events.c as a shared object; OSError or CalledProcessError where that cannot be."""
    shared = folder / "events.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    libraries = ["-ldl", "-pthread"]
    subprocess.run(
        ["cc", *options, str(HERE / "events.c"), "-o", str(shared), *libraries], check=True
    )
    return shared


def untimed(value: Any) -> Any:
    """Without the times and paths that differ between two equal runs."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in (*TIMES, *PLACES)}
    if isinstance(value, (list, tuple)):
        return [untimed(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def outcome(folder: Path) -> dict[str, Any]:
    """The content of each file of a finished run; of pictures and events only that they exist."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors" or path.name == "cohort.json":
            found[name] = path.read_bytes()
        elif path.suffix == ".ckpt":
            found[name] = untimed(torch.load(path, weights_only=True))
        elif path.suffix == ".jsonl":
            found[name] = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text()))
        elif path.parent.name == "tensorboard":
            found[f"{path.parent.relative_to(folder)}/*"] = True
        else:
            found[name] = path.stat().st_size > 0
    return found


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two outcomes differ, in words that fit a message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        lines = [f"{where}/{key} is missing" for key in expected.keys() - found.keys()]
        lines += [f"{where}/{key} is left over" for key in found.keys() - expected.keys()]
        for key in sorted(expected.keys() & found.keys(), key=str):
            lines += differences(found[key], expected[key], f"{where}/{key}")
        return lines
    if found != expected:
        return [f"{where}: {str(found)[:80]} is not {str(expected)[:80]}"]
    return []


@dataclass
class Recovery:
    """One run in one folder, which is started, broken and resumed. `job`: see `warm`."""

    warm: Warm
    folder: Path
    job: str = "command"
    options: tuple[str, ...] = ()

    def go(self, **breaking: Any) -> Ended:
        """Starts the run, or resumes it if it had come into being."""
        arguments = [*SETTINGS, *self.options, "--folder", str(self.folder)]
        if (self.folder / "config.yaml").is_file():
            arguments.append("--resume")
        log = self.folder.with_suffix(".log")
        return self.warm.run(self.job, arguments, log, **breaking)

    def at_event(self, mode: str, number: int) -> Ended:
        arm = {"folder": str(self.folder), "mode": mode, "at": number, "log": str(self.event_log)}
        return self.go(arm=arm)

    @property
    def event_log(self) -> Path:
        return self.folder.with_suffix(".events")

    def events(self) -> list[str]:
        """What the last `at_event` did, in order: the call and the file, without times in names."""
        lines = self.event_log.read_text().splitlines()
        return [re.sub(r"tfevents\..*", "tfevents", line.split(" ", 1)[1]) for line in lines]

    def differences(self, expected: dict[str, Any]) -> list[str]:
        """Finishes the run; what is then not as in a run that nothing broke."""
        ended = self.go()
        if ended.code != 0:
            return [f"resuming ended with {ended.code}: {ended.output}"]
        return differences(outcome(self.folder), expected)


def random_kills(
    warm: Warm, folder: Path, expected: dict[str, Any], seconds: float, random: Random, count: int
) -> Iterator[str]:
    """Kills runs of `seconds` at any time, `count` times in all; yields what came out wrong."""
    killed = runs = 0
    while killed < count:
        run, times = Recovery(warm, folder / f"run-{runs}"), []
        runs += 1
        while killed < count:
            times.append(random.uniform(0, seconds / 2))
            ended = run.go(kill_after=times[-1])
            if ended.code != SIGKILLED:
                break
            killed += 1
        lines = run.differences(expected)
        if lines or ended.code not in (0, SIGKILLED):
            told = ", ".join(f"{t:.3f}" for t in times)
            yield f"{run.folder}, killed after {told} s: {lines or ended}"
        else:
            shutil.rmtree(run.folder)


def at_events(
    warm: Warm,
    folder: Path,
    expected: dict[str, Any],
    mode: str,
    numbers: list[int],
    job: str,
) -> Iterator[str]:
    """Breaks a run each at the events of these numbers; yields what came out wrong."""
    for number in numbers:
        run = Recovery(warm, folder / f"{mode}-{number}", job)
        ended = run.at_event(mode, number)
        what = (run.events()[number:] or ["nothing"])[0]
        fine = said_why(ended) if mode == "full" else ended.code == SIGKILLED
        lines = [] if fine else [f"ended with {ended.code}: {ended.output}"]
        lines += run.differences(expected)
        if lines:
            yield f"{run.folder}, {mode} at event {number} ({what}): {lines}"
        else:
            shutil.rmtree(run.folder)


def said_why(ended: Ended) -> bool:
    """Whether it was stopped by a line, or was done in spite of a full disk."""
    errors = [line for line in ended.output.splitlines() if line.startswith("fastdml: ")]
    stopped = ended.code == 2 and len(errors) == 1 and ended.output.endswith(f"{errors[0]}\n")
    return (stopped or ended.code == 0) and "Traceback" not in ended.output


def one_of_each(events: list[str], random: Random) -> list[int]:
    """Of every call on every file one event, at random."""
    kinds: dict[str, list[int]] = {}
    for number, what in enumerate(events):
        kinds.setdefault(what, []).append(number)
    return sorted(random.choice(numbers) for numbers in kinds.values())
