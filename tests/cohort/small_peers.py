"""A network of one layer, and whether two networks have the same weights."""

from __future__ import annotations

import torch
from torch import nn


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(weights(one), weights(two), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def linear_net(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
