"""Training runs: `cifar100(...)`, `cifar10(...)`, `digits(...)`, or `fit` with one's own data.

Settings are those of `TrainConfig`, by name; `resume=True` goes on with a run, taking its settings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fastdml.train.config import TrainConfig, from_command_line, load_config, resolve
from fastdml.train.loop import fit, run
from fastdml.train.phase import TrainingDiverged, TrainingStopped
from fastdml.train.result import TrainResult

__all__ = [
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingStopped",
    "cifar10",
    "cifar100",
    "digits",
    "fit",
    "from_command_line",
    "load_config",
    "run",
]


def cifar100(
    peers: Sequence[str] | None = None, root: str | os.PathLike = "data", **config: Any
) -> TrainResult | None:
    """Trains peers on CIFAR-100, by default two ResNet-32 with the paper's settings."""
    return _train("cifar100", peers, root, config)


def cifar10(
    peers: Sequence[str] | None = None, root: str | os.PathLike = "data", **config: Any
) -> TrainResult | None:
    """Trains peers on CIFAR-10, by default two ResNet-32 with the paper's settings."""
    return _train("cifar10", peers, root, config)


def digits(peers: Sequence[str] | None = None, **config: Any) -> TrainResult | None:
    """Trains peers on scikit-learn's handwritten digits: seconds, and nothing to download."""
    return _train("digits", peers, None, config)


def _train(
    data: str,
    peers: Sequence[str] | None,
    root: str | os.PathLike | None,
    changes: dict[str, Any],
) -> TrainResult | None:
    if peers is not None:
        changes["peers"] = peers
    if root is not None:
        changes["root"] = root
    return run(resolve(data, changes))
