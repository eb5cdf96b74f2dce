"""Shared by tests of runs: runs that break, and comparisons of two runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from fastdml.cohort import Cohort
from fastdml.report.metrics_log import read_metrics
from fastdml.train.meters import Totals

ROOT = Path(__file__).parents[2]
TIMES = ("time", "images_per_second", "data_wait")


def environment() -> dict[str, str]:
    """Of another process that imports what this one does."""
    paths = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def logged(folder) -> list[dict]:
    return timeless(read_metrics(folder))


def same_weights(a: Cohort, b: Cohort) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Crash(Exception):
    pass


def crash():
    raise Crash


@contextmanager
def crashing(at: int) -> Iterator[None]:
    """A run that is begun within it crashes after its step `at`, counted from 1, before it is
    recorded."""
    count, steps = Totals.count, []

    def counting(totals: Totals, step: int) -> None:
        steps.append(totals)
        if len(steps) == at:
            raise Crash
        count(totals, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Totals, "count", counting)
        with pytest.raises(Crash):
            yield


class CrashingLoader:
    """Another loader's batches, and before one step of the run something else as well."""

    def __init__(self, loader, at: int, action=crash) -> None:
        self.loader, self.at, self.action = loader, at, action
        self.batch_size = loader.batch_size
        self.asked = 0

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, start=0):
        self.asked += 1
        if self.asked == 1:  # a look at the peers' shapes, before the run
            yield from self.loader.epoch(epoch, start)
            return
        for step, batch in enumerate(self.loader.epoch(epoch, start), start):
            if epoch * len(self) + step == self.at:
                self.action()
            yield batch


class Inputs(Dataset):
    """Samples without a label, as some sets give them."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]
