"""Reproductions of a second: the scale of digits with a few images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from recovery import untimed

from fastdml.reproduce.scales import REPEATABLE, SCALES

SETTINGS = {
    "subset": 64,
    "batch_size": 32,
    "epochs": 2,
    "eval_every": 2,
    "schedule": "cosine",
    "amp": "off",
    "save_every_steps": 1,
    **REPEATABLE,
}
TINY = dataclasses.replace(SCALES["digits"], seeds=2, cohort_sizes=(1, 2), settings=SETTINGS)
NAMES = ["table2:resnet32+resnet32", "distillation"]  # of which one teaches the other


def command(arguments: list[str]) -> int:
    """`fastdml reproduce` at this scale and without pictures, as a job of `warm`."""
    from fastdml.cli import main
    from fastdml.reproduce import results

    results.draw = lambda folder, record: []
    SCALES["digits"] = TINY
    return main(["reproduce", *arguments])


def arguments(folder: Path, names: list[str] = NAMES) -> list[str]:
    return [*names, "--scale", "digits", "--folder", str(folder), "--device", "cpu"]


def values(folder: Path, scale: str = "digits") -> dict[str, Any]:
    """What a reproduction came to: tables and summaries of its trainings, without times."""
    found: dict[str, Any] = {}
    for path in sorted((folder / scale).rglob("reproduction.json")):
        record = json.loads(path.read_text())
        found[path.parent.name] = {key: record[key] for key in ("rows", "seeds", "changes")}
        found[f"{path.parent.name}.csv"] = (path.parent / "table.csv").read_text()
    for path in sorted((folder / "trainings").rglob("summary.json")):
        text = path.read_text().replace(str(folder), "FOLDER")
        found[str(path.relative_to(folder))] = untimed(json.loads(text))
    return found
