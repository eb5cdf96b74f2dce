"""Fused Triton kernels for Deep Mutual Learning; needs torch and triton alone.

`mutual_loss`, `mutual_losses`, `linear_mutual_loss` and `evaluate` take checked arguments; the
functions of `fastdml` check them.
"""

from __future__ import annotations

from .linear_loss import linear_mutual_loss
from .loss_op import Call, evaluate, mutual_loss
from .options import Options
from .separate_losses import mutual_losses

__all__ = ["Call", "Options", "evaluate", "linear_mutual_loss", "mutual_loss", "mutual_losses"]
