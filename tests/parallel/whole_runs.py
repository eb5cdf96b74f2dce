"""Whole runs of tiny peers, on a mesh and in one process, and what they left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mesh_runs import SIDE, C, cohort, network
from reid_runs import SMALL
from torch import Tensor

from fastdml import Cohort
from fastdml.report.metrics_log import read_metrics
from fastdml.train import TrainConfig, TrainResult, cifar100, digits, fit, market1501

ROWS, BATCH, EPOCHS = 48, 8, 5  # 30 steps
CLOCKS = ("time", "images_per_second", "data_wait")
QUIET: dict[str, Any] = {
    "threads": 1, "timeout": 30.0, "execution": "eager", "amp": "off", "device": "cpu",
    "tensorboard": False, "figures": (),  # which take longer than these runs
}  # fmt: skip


class Run(NamedTuple):
    records: list[dict[str, Any]]  # of metrics.jsonl, without what a clock says
    weights: dict[str, Tensor]  # in the folder at the end
    given_back: dict[str, Tensor] | None  # in the caller's cohort
    result: TrainResult


def arrays(n: int = ROWS, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 2, SIDE, SIDE, generator=g, dtype=torch.float64)
    labels = torch.randint(C, (n,), generator=g)
    images[:, 0] += labels[:, None, None].to(images.dtype)
    return images.to(dtype), labels


def settings(mesh: str, folder: Path, **changes: Any) -> TrainConfig:
    values = {
        "mesh": mesh, "folder": str(folder), "batch_size": BATCH, "epochs": EPOCHS, "lr": 0.05,
        "log_every": 4,
    }  # fmt: skip
    return TrainConfig(**{**QUIET, **values, **changes})


def quick() -> None:
    torch.set_num_threads(1)


def trained(
    mesh: str,
    folder: Path,
    *,
    K: int = 2,
    drop: float = 0.0,
    dtype: torch.dtype = torch.float64,
    teacher: bool = False,
    unlabelled: bool = False,
    validation_data: bool = False,
    callbacks: Any = (),
    **changes: Any,
) -> Run:
    """The run of K peers of different widths in this folder."""
    quick()
    peers = cohort(K, dtype, drop)
    more: dict[str, Any] = {}
    if teacher:
        more["teachers"] = [network(9, 6).to(dtype)]
    if unlabelled:
        more["unlabelled"] = arrays(24, 5, dtype)[0]
        changes = {"unlabelled_share": 0.25, **changes}
    if validation_data:
        more["validation"] = arrays(16, 2, dtype)
    config = settings(mesh, folder, **changes)
    data = arrays(dtype=dtype), arrays(16, 1, dtype)
    result = fit(peers, *data, config, callbacks=callbacks, **more)
    assert result is not None
    found = cohort(K, dtype, drop)
    Cohort.load(folder, peers=list(found.peers))
    return Run(logged(folder), found.state_dict(), peers.state_dict(), result)


def on_digits(mesh: str, folder: Path, **changes: Any) -> Run:
    return of_images(digits, mesh, folder, eval_every=5, **changes)


def on_cifar(mesh: str, folder: Path, **changes: Any) -> Run:
    return of_images(cifar100, mesh, folder, eval_every=10, **changes)


def of_images(train: Callable[..., Any], mesh: str, folder: Path, **changes: Any) -> Run:
    """Real images, cropped at random, in float32."""
    quick()
    values = {"peers": ("resnet8", "resnet8"), "subset": 96, "batch_size": 32, "epochs": 10}
    found = train(mesh=mesh, folder=folder, **{**QUIET, **values, **changes})
    assert found is not None
    return Run(logged(folder), Cohort.load(folder).state_dict(), None, found)


def of_people(mesh: str, folder: Path, root: Path, **changes: Any) -> Run:
    """Re-identification with every loss there is, PK batches and features over all ranks."""
    quick()
    values = {
        "triplet_weight": 1.0, "center_weight": 5e-4, "circle_weight": 0.5,
        "distance_mutual_weight": 1.0, "epochs": 10, "eval_every": 5,
    }  # fmt: skip
    found = market1501(
        root=root, mesh=mesh, folder=folder, **{**SMALL, **QUIET, **values, **changes}
    )
    assert found is not None
    return Run(logged(folder), Cohort.load(folder).state_dict(), None, found)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [{n: v for n, v in r.items() if n not in CLOCKS} for r in read_metrics(folder)]


def assert_same(
    ours: Run, theirs: Run, *, metrics: float = 1e-12, weights: float = 0.0, statistics: bool = True
) -> None:
    """Metrics to rounding, weights bit for bit by default. statistics: whether running statistics
    are the same too, and so what is evaluated; columns have their own, and are scored by the mean
    of them."""
    kinds = {"peers", "train", "epoch"} | ({"test"} if statistics else set())
    records = [[r for r in run.records if r["kind"] in kinds] for run in (ours, theirs)]
    places = [[(r["kind"], r["step"]) for r in found] for found in records]
    assert places[0] == places[1]
    for one, other in zip(*records, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"kind", "names"}:
            if isinstance(one[name], str):  # which weights were scored
                assert one[name] == other[name]
                continue
            values = (np.array(r[name], float) for r in (one, other))
            place = f"{name} of step {one['step']}"
            np.testing.assert_allclose(*values, metrics, metrics, err_msg=place)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, value in ours.weights.items():
        if statistics or ("running_" not in name and "num_batches" not in name):
            other = theirs.weights[name]
            torch.testing.assert_close(value, other, rtol=weights, atol=weights, msg=name)
