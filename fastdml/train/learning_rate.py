"""The learning rate of every step of a run, from its settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdml.engine import learning_rates
from fastdml.train.config.base import TrainConfig


def total_steps(config: TrainConfig, steps: int) -> int:
    """The number of steps of a run whose epochs have `steps`."""
    return config.iterations or config.epochs * steps


def rates(config: TrainConfig, steps: int) -> Tensor:
    """The learning rate of every step of a run, (total_steps,) fp32 on the host."""
    total = total_steps(config, steps)
    epochs = max(-(-total // steps), math.ceil(config.warmup_epochs))  # it may end in the warm-up
    if config.schedule == "cosine" and config.iterations:  # half a cosine over these steps
        warmup = config.warmup_epochs * steps / total
        return learning_rates(
            lr=config.lr, epochs=1, steps=total, schedule="cosine", warmup_epochs=warmup
        )
    periodic = config.lr_drop_every and not config.lr_drops
    table = learning_rates(
        lr=config.lr,
        epochs=epochs,
        steps=steps,
        schedule=config.schedule,
        drop_every=config.lr_drop_every if periodic else epochs,
        drop_factor=config.lr_drop_factor,
        warmup_epochs=config.warmup_epochs,
    )[:total]
    if config.schedule == "step" and config.lr_drops:
        epoch = torch.arange(total) // steps
        past = (epoch[:, None] >= torch.tensor(config.lr_drops)).sum(1)  # drops before each step
        table = (table.double() * config.lr_drop_factor**past).float()
    return table
