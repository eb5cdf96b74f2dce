"""Fused Triton kernels for Deep Mutual Learning; needs torch and triton alone.

`mutual_loss` and `evaluate` take checked arguments; `fastdml.mutual_loss` is the checked form.
"""

from __future__ import annotations

from .op import Call, evaluate, mutual_loss
from .options import Options

__all__ = ["Call", "Options", "evaluate", "mutual_loss"]
