"""Fused Triton kernels for Deep Mutual Learning; needs torch and triton alone.

`mutual_loss`, `linear_mutual_loss` and `evaluate` take checked arguments; `fastdml.mutual_loss` is the checked form.
"""

from __future__ import annotations

from .linear import linear_mutual_loss
from .op import Call, evaluate, mutual_loss
from .options import Options

__all__ = ["Call", "Options", "evaluate", "linear_mutual_loss", "mutual_loss"]
