"""Deep Mutual Learning as fast as the hardware allows.

Names are imported when first used, so that `fastdml --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdml import logs

if TYPE_CHECKING:
    from fastdml import analysis, data, engine, metrics, models, parallel, plan, reproduce, train
    from fastdml.cohort import Cohort
    from fastdml.linear_loss import LinearRows, linear_mutual_loss
    from fastdml.loss import MutualLoss, mutual_loss, mutual_losses
    from fastdml.metric_losses import (
        CenterLoss,
        MetricLoss,
        circle_loss,
        distance_mutual_loss,
        triplet_loss,
    )
    from fastdml.models import ReidHead, create_model
    from fastdml.mutual_stats import MutualStats
    from fastdml.predictor import Predictor, load
    from fastdml.scalar_schedule import ScalarSchedule

__version__ = "0.3.0"

_HOMES = {
    "CenterLoss": "fastdml.metric_losses",
    "Cohort": "fastdml.cohort",
    "LinearRows": "fastdml.linear_loss",
    "MetricLoss": "fastdml.metric_losses",
    "MutualLoss": "fastdml.loss",
    "MutualStats": "fastdml.mutual_stats",
    "Predictor": "fastdml.predictor",
    "ReidHead": "fastdml.models",
    "ScalarSchedule": "fastdml.scalar_schedule",
    "circle_loss": "fastdml.metric_losses",
    "create_model": "fastdml.models",
    "distance_mutual_loss": "fastdml.metric_losses",
    "linear_mutual_loss": "fastdml.linear_loss",
    "load": "fastdml.predictor",
    "mutual_loss": "fastdml.loss",
    "mutual_losses": "fastdml.loss",
    "triplet_loss": "fastdml.metric_losses",
}
_MODULES = (
    "analysis", "data", "engine", "metrics", "models", "parallel", "plan", "reproduce", "train",
)  # fmt: skip

__all__ = [
    "CenterLoss",
    "Cohort",
    "LinearRows",
    "MetricLoss",
    "MutualLoss",
    "MutualStats",
    "Predictor",
    "ReidHead",
    "ScalarSchedule",
    "analysis",
    "circle_loss",
    "create_model",
    "data",
    "distance_mutual_loss",
    "engine",
    "linear_mutual_loss",
    "load",
    "metrics",
    "models",
    "mutual_loss",
    "mutual_losses",
    "parallel",
    "plan",
    "reproduce",
    "train",
    "triplet_loss",
]

logs.install()


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"fastdml.{name}")
        raise AttributeError(f"module 'fastdml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
