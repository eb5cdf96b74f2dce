"""The schedules of the loss's numbers in a run, from its settings."""

from __future__ import annotations

import torch

from fastdml.errors import InputError
from fastdml.scalar_schedule import ScalarSchedule
from fastdml.train.config.base import TrainConfig


def loss_schedules(
    config: TrainConfig, steps: int, total: int, device: torch.device
) -> dict[str, ScalarSchedule]:
    """Those of `MutualLoss`'s temperature and kl_weight that change during a run, by name. steps:
    an epoch. total: steps of the run. A number that stays has none, so that the loss knows it.
    Raises InputError for a warm-up that leaves no step to go to the end in."""
    found = {}
    for name, prefix, warmup_from in (
        ("temperature", "temperature", 1.0),
        ("kl_weight", "kl", 0.0),
    ):
        kind, end = getattr(config, f"{prefix}_schedule"), getattr(config, f"{name}_end")
        warmup = round(getattr(config, f"{prefix}_warmup_epochs") * steps)
        if kind != "constant" and warmup >= total:
            raise InputError(
                f"{prefix}_warmup_epochs is {warmup} steps, and the run has {total}, so that none "
                f"is left for {prefix}_schedule {kind}: shorten the warm-up, or set "
                f"{prefix}_schedule to constant"
            )
        if kind != "constant" or warmup:
            found[name] = ScalarSchedule(
                getattr(config, name),
                end,
                steps=max(total, warmup),  # a run may end within the warm-up, and be prolonged
                kind=kind,
                warmup=warmup,
                warmup_from=warmup_from,
                device=device,
            )
    return found
