"""NVIDIA Apex's fused optimizers, where Apex is installed.

The package called `apex` on PyPI is an unrelated one for web logins; it is recognised and named.
Apex is built from source for CUDA devices (https://github.com/NVIDIA/apex).

FusedSGD and FusedLAMB take their learning rate as a number from the host, so they follow the
schedule step by step without a CUDA graph; FusedAdam takes it from the device and can be captured.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastdml.errors import InputError
from fastdml.namesake import other_apex

NAMES = {"apex_sgd": "FusedSGD", "apex_adam": "FusedAdam", "apex_lamb": "FusedLAMB"}
INSTALL = "build it from https://github.com/NVIDIA/apex, or use sgd, adam or adamw"


def make_apex_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    device: torch.device,
) -> Optimizer:
    """`groups`: those with weights, one a peer. apex_adam decays weights as AdamW does."""
    optimizers = _import(name)
    if device.type != "cuda":
        raise InputError(f"optimizer {name!r} needs a CUDA device, not {device}: use sgd or adam")
    kind = getattr(optimizers, NAMES[name])
    if name == "apex_sgd":
        nesterov = nesterov and momentum > 0
        return kind(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    betas = (momentum, 0.999)
    if name == "apex_adam":
        return kind(groups, lr=lr, betas=betas, weight_decay=weight_decay, capturable=True)
    return kind(groups, lr=lr, betas=betas, weight_decay=weight_decay)


def takes_number(optimizer: Optimizer) -> bool:
    """Whether the learning rate has to be a number: Apex's, unless made capturable."""
    apex = type(optimizer).__module__.split(".")[0] == "apex"
    return apex and not isinstance(optimizer.param_groups[0]["lr"], Tensor)


def _import(name: str) -> Any:
    if importlib.util.find_spec("apex") is None:
        raise InputError(f"optimizer {name!r} needs NVIDIA Apex: {INSTALL}")
    namesake = other_apex()
    if namesake is not None:
        raise InputError(
            f"optimizer {name!r}: the installed package apex ({namesake}) is not NVIDIA's but "
            f"PyPI's of the same name; uninstall it and {INSTALL}"
        )
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # Apex's CUDA extension
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"optimizer {name!r}: Apex is installed without working CUDA extensions ({reason}): "
            f"{INSTALL}"
        ) from None
    return optimizers
