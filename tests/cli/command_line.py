"""Helpers for tests of the command: a saved run, and a run of an earlier version."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fastdml.cohort import Cohort
from fastdml.image_record import FIELDS
from fastdml.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
FASTDML = [sys.executable, "-m", "fastdml"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def saved(cohort: Cohort, run: Path, **settings) -> None:
    """Saves the parts of a run that `evaluate` and `export` read."""
    run.mkdir(exist_ok=True)
    cohort.save(run)
    TrainConfig(**settings).save(run / "config.yaml")


def forget_the_record(run: Path) -> None:
    """Makes the weights of a run those of an earlier version."""
    for path in run.rglob("cohort.json"):
        old = {k: v for k, v in json.loads(path.read_text()).items() if k not in FIELDS}
        path.write_text(json.dumps(old))


def cifar10_files(root: Path, **contents: bytes) -> Path:
    folder = root / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / f"{name}.bin").write_bytes(contents.get(name, b""))
    return folder
