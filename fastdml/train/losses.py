"""What a run's settings mean to the step: its losses and its learning rates."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.engine import learning_rates
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.reid import METRIC_WEIGHTS, ReidConfig


def mutual_loss(config: TrainConfig, K: int) -> MutualLoss:
    summed = isinstance(config, ReidConfig) and config.kl_sum
    return MutualLoss(
        temperature=config.temperature,
        ce_weight=config.ce_weight,
        kl_weight=config.kl_weight,
        label_smoothing=config.label_smoothing,
        peer_weights=torch.ones(K, K) if summed else None,
    )


def metric_loss(config: TrainConfig, cohort: Cohort) -> MetricLoss | None:
    """The losses on features that `config` gives a weight to, with fresh centres; None: none."""
    if not isinstance(config, ReidConfig) or not any(getattr(config, n) for n in METRIC_WEIGHTS):
        return None
    return MetricLoss(
        triplet=config.triplet_weight,
        margin=config.margin,
        center=config.center_weight,
        circle=config.circle_weight,
        distance_mutual=config.distance_mutual_weight,
        num_classes=cohort.num_classes,
        # a peer without a head has no features; the step says so
        dims=[getattr(peer, "num_features", 0) for peer in cohort.peers],
    )


def total_steps(config: TrainConfig, steps: int) -> int:
    """Of a run whose epochs have `steps`."""
    return config.iterations or config.epochs * steps


def rates(config: TrainConfig, steps: int) -> Tensor:
    """The learning rate of every step of a run, (total_steps,) fp32 on the host."""
    total = total_steps(config, steps)
    epochs = -(-total // steps)
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
