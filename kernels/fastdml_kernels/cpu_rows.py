"""The loss on the CPU in native code: `cpu_rows.c` and its parts, compiled at installation.

It serves float32 and bfloat16 logits, mixed too, with constant teachers: all targets, gates and
divergences, students, weights of peers, classes and samples, rows without a label that mimic, and
all reductions. `cpu` computes in torch, slower, what is left:

- float64, whose sums are in float64 throughout, and float16, whose gradients wait for a loss scale;
- gradients into the teachers (detach_targets=False), which mix the losses' own gradients, and with
  them every `upstream`;
- more than 16 peers;
- what the C code refuses once it sees the values: a logit or a loss that is not finite, whose
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
from struct import Struct

import torch
from torch import Tensor

from .options import Options
from .stats_layout import stats_layout

MOST_PEERS = 16  # as in cpu_rows.h, like the numbers of these choices
TYPES: dict[torch.dtype, tuple[int | None, int]] = {torch.float32: (0, 4), torch.bfloat16: (1, 2)}
UNKNOWN = (None, 0)  # of a type: its number, and its bytes
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
DIVERGENCES = {"forward": 0, "reverse": 1, "jeffreys": 2, "jsd": 3}
TARGETS = {"peers": 0, "ensemble": 1, "ensemble_logits": 2}
CPU = torch.device("cpu")
GATES = {"none": 0, "correct": 1, "best": 2, "confidence": 3, "entropy": 4}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code beside this file, or None where there is none that loads."""
    for path in sorted(Path(__file__).parent.glob("_cpu_rows*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:  # built for another system
            continue
        if hasattr(found, "fastdml_mutual_loss"):  # else it was built from earlier code
            found.fastdml_mutual_loss.argtypes = [ctypes.c_char_p]
            return found
    return None


@cache
def stats_positions(K: int) -> array[int]:
    """The layout of the packed statistics, as the C code reads it."""
    return array("q", stats_layout(K))


@cache
def _form(K: int) -> Struct:
    """The arguments of the C code for K peers: `Call` in cpu_rows.c."""
    return Struct(f"=18q5d{5 * K}q")


def _address(weights: Tensor | None, held: list[Tensor]) -> int:
    """Of weights as the C code reads them, which are kept in `held`; 0 for none."""
    if weights is None:
        return 0
    held.append(weights.to(torch.float32).contiguous())
    return held[-1].data_ptr()


def rows_loss(
    logits: Sequence[Tensor],  # K tensors (N, C)
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
    for what is a case for torch: `grads` may then hold anything. Raises MemoryError."""
    K, (N, C), native = len(logits), logits[0].shape, library()
    if native is None or not options.detach_targets or K > MOST_PEERS or not N:
        return None
    held = [labels.contiguous()]
    of_peers: list[int] = []
    for z, g in zip(logits, grads or (None,) * K, strict=True):
        number, size = TYPES.get(z.dtype, UNKNOWN)
        if number is None:
            return None
        row, step = z.stride()
        if step != 1:
            z = z.contiguous()
            held.append(z)
            row = z.stride(0)
        if g is None:
            of_peers += z.data_ptr(), 0, size * row, 0, number
        else:
            of_peers += z.data_ptr(), g.data_ptr(), size * row, size * g.stride(0), number
    reduction = REDUCTIONS[options.reduction]
    shape = (K, N) if reduction == 2 else (K,)
    losses = torch.empty(shape, dtype=torch.float32, device=CPU)
    stats, of_stats = None, 0
    if want_stats:
        stats = torch.zeros(stats_layout(K).size, dtype=torch.float32, device=CPU)
        of_stats = stats.data_ptr()
    status = native.fastdml_mutual_loss(
        _form(K).pack(
            K, N, C, labels.itemsize, options.ignore_index, torch.get_num_threads(), reduction,
            DIVERGENCES[options.divergence], TARGETS[options.target], GATES[options.gate],
            options.mimic_ignored, held[0].data_ptr(), losses.data_ptr(), of_stats,
            stats_positions(K).buffer_info()[0], _address(peer_weights, held),
            _address(class_weight, held), _address(sample_weight, held),
            temperature, options.label_smoothing, ce_weight, kl_weight, options.jsd_beta,
            *of_peers,
        )
    )  # fmt: skip
    if status == 2:
        raise MemoryError(f"mutual_loss: no memory for the sums of {N} rows")
    return None if status else (losses, stats)
