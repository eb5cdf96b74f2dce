"""The loss on the CPU in native code: `cpu_rows.c` and its parts, compiled at installation.

It serves float32 and bfloat16 logits, mixed too, with constant teachers: all targets, gates and
divergences, students, weights of peers, classes and samples, rows without a label that mimic, and
all reductions. `cpu` computes in torch, slower, what is left:

- float64, whose sums are in float64 throughout, and float16, whose gradients wait for a loss scale;
- gradients into the teachers (detach_targets=False), which mix the losses' own gradients, and with
  them every `upstream`;
- more than 16 peers;
- what `rows_loss` refuses once it sees the values: a logit or a loss that is not finite, whose
  infinities and NaNs torch propagates; a label that is no class; weights that are negative or not
  finite; a batch in which no row counts;
- everything, where there was no C compiler at installation.
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

MOST_PEERS = 16  # as in cpu_rows.h, like the numbers of these choices
TYPES = {torch.float32: (0, 4), torch.bfloat16: (1, 2)}  # number, bytes
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
DIVERGENCES = {"forward": 0, "reverse": 1, "jeffreys": 2, "jsd": 3}
TARGETS = {"peers": 0, "ensemble": 1, "ensemble_logits": 2}
GATES = {"none": 0, "correct": 1, "best": 2, "confidence": 3, "entropy": 4}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code beside this file, or None where there is none that loads."""
    for path in sorted(Path(__file__).parent.glob("_cpu_rows*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:  # built for another system
            continue
        if hasattr(found, "fastdml_loss"):  # else it was built from earlier code
            found.fastdml_loss.argtypes = [ctypes.c_void_p] * 3
            return found
    return None


@cache
def stats_positions(K: int) -> array[int]:
    """The layout of the packed statistics, as the C code reads it."""
    return array("q", stats_layout(K))


def takes(logits: Sequence[Tensor], options: Options, upstream: Tensor | None = None) -> bool:
    """Whether `rows_loss` supports these logits and options."""
    return (
        options.detach_targets and upstream is None and len(logits) <= MOST_PEERS
        and all(z.dtype in TYPES for z in logits) and library() is not None
    )  # fmt: skip


def _floats(weights: Tensor | None) -> Tensor | None:
    """Weights as the C code reads them."""
    return None if weights is None else weights.to(torch.float32).contiguous()


def rows_loss(
    logits: Sequence[Tensor],  # K tensors (N, C), float32 or bfloat16
    labels: Tensor,  # (N,)
    options: Options,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    grads: Sequence[Tensor | None],  # K (N, C) to be written, their last stride 1; () for none
    want_stats: bool,
    peer_weights: Tensor | None = None,  # (K, K)
    class_weight: Tensor | None = None,  # (C,)
    sample_weight: Tensor | None = None,  # (N,)
) -> tuple[Tensor, Tensor | None] | None:
    """Losses (K,) or (K, N) and packed statistics (None if not wanted) in float32; None altogether
    where the values are a case for torch: `grads` may then hold anything. Raises MemoryError."""
    K, (N, C) = len(logits), logits[0].shape
    logits = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
    labels = labels.contiguous()
    shape = (K, N) if options.reduction == "none" else (K,)
    losses = torch.empty(shape, dtype=torch.float32, device="cpu")
    stats = None
    if want_stats:
        stats = torch.zeros(stats_layout(K).size, dtype=torch.float32, device="cpu")
    weights = [_floats(w) for w in (peer_weights, class_weight, sample_weight)]
    whole = [
        K, N, C, labels.itemsize, options.ignore_index, torch.get_num_threads(),
        REDUCTIONS[options.reduction], DIVERGENCES[options.divergence], TARGETS[options.target],
        GATES[options.gate], options.mimic_ignored, labels.data_ptr(), losses.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        *[0 if w is None else w.data_ptr() for w in weights],
    ]  # fmt: skip
    for z, g in zip(logits, grads or (None,) * K, strict=True):
        number, size = TYPES[z.dtype]
        to, g_row = (0, 0) if g is None else (g.data_ptr(), g.stride(0))
        whole += (z.data_ptr(), to, size * z.stride(0), size * g_row, number)
    real = (temperature, options.label_smoothing, ce_weight, kl_weight, options.jsd_beta)
    native = library()
    assert native is not None  # `takes` has seen it
    wholes, reals = array("q", whole), array("d", real)
    status = native.fastdml_loss(
        wholes.buffer_info()[0], reals.buffer_info()[0], stats_positions(K).buffer_info()[0]
    )
    if status == 2:
        raise MemoryError(f"mutual_loss: no memory for the sums of {N} rows")
    return None if status else (losses, stats)
