"""Fused Triton kernels for Deep Mutual Learning; needs torch and triton alone.

`mutual_loss`, `mutual_losses`, `linear_mutual_loss` and `losses_and_grads` take checked arguments;
functions of `fastdml` check them.
"""

from __future__ import annotations

from .linear_loss import linear_mutual_loss
from .loss_op import Call, losses_and_grads, mutual_loss
from .options import Options
from .separate_losses import mutual_losses

__all__ = [
    "Call",
    "Options",
    "linear_mutual_loss",
    "losses_and_grads",
    "mutual_loss",
    "mutual_losses",
]
