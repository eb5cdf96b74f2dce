"""The optimizer that the settings of a run describe."""

from __future__ import annotations

import torch

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer
from fastdml.train.config.base import TrainConfig


def optimizer_of(config: TrainConfig, cohort: Cohort) -> torch.optim.Optimizer:
    """One over all peers of `cohort`. Raises as `make_optimizer` does."""
    return make_optimizer(
        cohort,
        config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
