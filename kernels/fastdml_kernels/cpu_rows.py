"""The common options on the CPU in native code: `cpu_rows.c`, compiled at installation.

Without a C compiler there, `takes` is always False, and `cpu` does the same in torch, slower.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .options import Options
from .stats_layout import stats_layout

MOST_PEERS = 16  # as in cpu_rows.c
TYPES = {torch.float32: (0, 4), torch.bfloat16: (1, 2)}  # number in cpu_rows.c, bytes


@cache
def library() -> ctypes.CDLL | None:
    """The compiled `cpu_rows.c` beside this file, or None where there is none that loads."""
    for path in sorted(Path(__file__).parent.glob("_cpu_rows*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:  # built for another system
            continue
        found.fastdml_rows.argtypes = [ctypes.c_void_p] * 3
        return found
    return None


@cache
def stats_positions(K: int) -> array[int]:
    """The layout of the packed statistics, as cpu_rows.c reads it."""
    return array("q", stats_layout(K))


def takes(logits: Sequence[Tensor], options: Options) -> bool:
    """Whether `rows_loss` supports these logits and options."""
    return (
        options.target == "peers" and options.gate == "none" and options.divergence == "forward"
        and options.detach_targets and options.reduction != "none" and not options.mimic_ignored
        and len(logits) <= MOST_PEERS and all(z.dtype in TYPES for z in logits)
        and library() is not None
    )  # fmt: skip


def rows_loss(
    logits: Sequence[Tensor],  # K tensors (N, C), float32 or bfloat16
    labels: Tensor,  # (N,)
    options: Options,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    grads: Sequence[Tensor],  # K tensors (N, C) to be written, their last stride 1; () for none
    want_stats: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Losses (K,) and packed statistics (None if not wanted) in float32; None altogether where a
    logit is not finite, a label is no class or no row has one: `grads` may then hold anything.
    Raises MemoryError."""
    K, (N, C) = len(logits), logits[0].shape
    logits = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
    labels = labels.contiguous()
    losses = torch.empty(K, dtype=torch.float32, device="cpu")
    stats = None
    if want_stats:
        stats = torch.zeros(stats_layout(K).size, dtype=torch.float32, device="cpu")
    whole = [
        K, N, C, labels.itemsize, options.ignore_index, options.reduction == "mean",
        torch.get_num_threads(), labels.data_ptr(), losses.data_ptr(),
        0 if stats is None else stats.data_ptr(),
    ]  # fmt: skip
    for k, z in enumerate(logits):
        number, size = TYPES[z.dtype]
        g, g_row = (grads[k].data_ptr(), grads[k].stride(0)) if grads else (0, 0)
        whole += (z.data_ptr(), g, size * z.stride(0), size * g_row, number)
    real = (temperature, options.label_smoothing, ce_weight, kl_weight)
    native = library()
    assert native is not None  # `takes` has seen it
    wholes, reals = array("q", whole), array("d", real)
    status = native.fastdml_rows(
        wholes.buffer_info()[0], reals.buffer_info()[0], stats_positions(K).buffer_info()[0]
    )
    if status == 2:
        raise MemoryError(f"mutual_loss: no memory for the sums of {N} rows")
    return None if status else (losses, stats)
