"""The schedules of the loss's numbers in a run, from its settings."""

from __future__ import annotations

import torch

from fastdml.scalar_schedule import ScalarSchedule
from fastdml.train.config.base import TrainConfig


def loss_schedules(
    config: TrainConfig, steps: int, total: int, device: torch.device
) -> dict[str, ScalarSchedule]:
    """Those of `MutualLoss`'s temperature and kl_weight that change during a run, by name. steps:
    an epoch. total: steps of the run. A number that stays has none, so that the loss knows it."""
    found = {}
    for name, kind, end, warmup_epochs, warmup_from in (
        (
            "temperature",
            config.temperature_schedule,
            config.temperature_end,
            config.temperature_warmup_epochs,
            1.0,
        ),
        ("kl_weight", config.kl_schedule, config.kl_weight_end, config.kl_warmup_epochs, 0.0),
    ):
        warmup = min(round(warmup_epochs * steps), total)
        if kind != "constant" or warmup:
            found[name] = ScalarSchedule(
                getattr(config, name),
                end,
                steps=total,
                kind=kind,
                warmup=warmup,
                warmup_from=warmup_from,
                device=device,
            )
    return found
