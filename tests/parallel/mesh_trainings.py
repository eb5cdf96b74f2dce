"""Whole trainings of tiny peers on meshes, which are stopped, damaged and resumed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mesh_runs import SIDE, C, network

from fastdml import Cohort
from fastdml.logs import LOGGER
from fastdml.parallel import Mesh, make_mesh
from fastdml.report.metrics_log import read_metrics
from fastdml.train import TrainConfig, checkpoint_reading, fit
from fastdml.train.meters import Totals
from fastdml.train.stopping import TrainingStopped

TIMES = ("time", "images_per_second", "data_wait")
K, BATCH, STEPS = 4, 16, 6  # peers, rows and steps an epoch
WIDTHS = [4, 5, 6, 7]


def peers(drop: float = 0.0, count: int = K) -> Cohort:
    """In float64, each of another width."""
    return Cohort([network(k, WIDTHS[k], drop) for k in range(count)], C)


def data(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (n,), generator=g)
    images = torch.randn(n, 2, SIDE, SIDE, generator=g, dtype=torch.float64)
    return images + labels.view(n, 1, 1, 1) / 2, labels


def settings(folder: Path, **changes: Any) -> TrainConfig:
    given = {
        "epochs": 2, "batch_size": BATCH, "lr": 0.1, "ema": 0.9, "log_every": 1, "amp": "off",
        "threads": 1, "tensorboard": False, "figures": [], "warmup_epochs": 1, "eval_every": 1,
        "execution": "eager", "schedule": "cosine",
    }  # fmt: skip
    return TrainConfig(folder=str(folder), **given | changes)


def train(
    folder: Path,
    mesh: Mesh | None,
    *,
    stop_after: int | None = None,
    drop: float = 0.0,
    count: int = K,
    **changes: Any,
) -> Cohort | None:
    """Trains, or goes on where there is a run in the folder already. stop_after: this rank is told
    to end after that step of the run; then None."""
    torch.set_num_threads(1)
    cohort = peers(drop, count)
    resume = (folder / "config.yaml").is_file()
    if mesh is not None and mesh.world > 1:
        dist.barrier(mesh.control)
    config = settings(folder, resume=resume, **changes)
    counted = Totals.count

    def count_and_stop(totals: Totals, *steps: int) -> None:
        counted(totals, *steps)
        if int(totals.step) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    Totals.count = count_and_stop if stop_after else counted
    try:
        result = fit(cohort, data(BATCH * STEPS, 1), data(20, 2), config, mesh=mesh)
    except TrainingStopped:
        return None
    finally:
        Totals.count = counted
    assert result is not None
    return cohort


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings that are logged within it."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)


def flip(path: Path, bit: int) -> None:
    """Changes a bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def copy(source: Path, folder: Path, mesh: Mesh | None = None) -> Path:
    """Rank 0 copies a run; all wait for it."""
    if mesh is None or mesh.lead:
        shutil.copytree(source, folder)
    if mesh is not None:
        mesh.gather(None)
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint and the log of a run hold, without times."""
    found = checkpoint_reading.read_newest(folder)
    assert found is not None
    state = found.state
    return {
        "position": state["position"],
        "weights": state["cohort"],
        "ema": state["ema"],
        "scores": state["scores"],
        "best": (state["best_epoch"], state["best_scores"]),
        "updates": int(state["updates"]),
        "metrics": logged(folder),
    }


def without_statistics(found: dict[str, Any]) -> dict[str, Any]:
    """Without what follows the number of parts of a batch that one column runs: running statistics,
    which take in a part at a time, and the scores of peers that are evaluated with them."""
    tensors = {
        key: {n: t for n, t in found[key].items() if "running_" not in n and "tracked" not in n}
        for key in ("weights", "ema")
    }
    metrics = [record for record in found["metrics"] if record["kind"] != "test"]
    return found | tensors | {"scores": None, "best": None, "metrics": metrics}


def logged(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder)]


def furthest(a: Any, b: Any) -> float:
    """The largest difference of two outcomes, relative to 1 or the value; infinite where they are
    not of one form."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return float("inf")
        return max((furthest(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return float("inf")
        return max(map(furthest, a, b), default=0.0)
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape:
            return float("inf")
        gap = (a.double() - b.double()).abs() / b.double().abs().clamp(min=1)
        return float(gap.max()) if gap.numel() else 0.0
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) / max(1.0, abs(b))
    return 0.0 if a == b else float("inf")


def made(peer: int, column: int, timeout: float = 30.0) -> Mesh:
    return make_mesh(peer, column, timeout=timeout, device="cpu")
