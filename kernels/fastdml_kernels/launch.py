"""Chooses the launch for a shape and makes it: blocks, grid, buffers, the finished-programs counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .options import Options, Scalar, default_edge, stats_size
from .register_rows import register_rows

# (K * BLOCK_C up to, rows a program, warps): 32 float32 values a thread for each row set, the
# most that compiles without spills on sm_90 (kernels/README.md holds the compiler's figures).
REGISTER_TILES = ((512, 4, 4), (1024, 4, 4), (2048, 2, 4), (4096, 1, 4), (8192, 1, 16),
                  (1 << 30, 1, 16))  # fmt: skip
COUNT_IN_KERNEL = 4096  # labels: up to here every program counts them itself, sparing a launch
PROGRAMS_PER_SM = 8
INTERPRETER_PROGRAMS = 6  # without a GPU: few, so that the walk over row blocks is exercised


@dataclass(frozen=True)
class Tile:
    rows: int
    block_c: int
    warps: int


def register_tile(K: int, C: int) -> Tile | None:
    """The tile that holds K rows of C classes in registers, or None where none does."""
    block_c = triton.next_power_of_2(max(C, 2))
    for limit, rows, warps in REGISTER_TILES:
        if K * block_c <= limit:
            return Tile(rows, block_c, warps)
    return None


@lru_cache(maxsize=None)
def _max_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


class _Counters:
    """Zeroed int32 counters of one device: one for each stream, and one for each captured launch,
    which may replay at any time and so never shares."""

    CAPTURED = 4096

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captured = torch.zeros(self.CAPTURED, dtype=torch.int32, device=device)
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}

    def take(self) -> Tensor:
        if self.device.type != "cuda":
            return self.captured[:1]
        if torch.cuda.is_current_stream_capturing():
            if self.used == self.CAPTURED:  # the graph then zeroes its own, one more node
                return torch.zeros(1, dtype=torch.int32, device=self.device)
            self.used += 1
            return self.captured[self.used - 1 : self.used]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if stream not in self.of_stream:
            self.of_stream[stream] = torch.zeros(1, dtype=torch.int32, device=self.device)
        return self.of_stream[stream]


@lru_cache(maxsize=None)
def _counters(device: torch.device) -> _Counters:
    return _Counters(device)


def _readable(z: Tensor, multiple: int = 8) -> int:
    """Columns of each row that may be read: C rounded up where the storage holds the padding, so
    that the last vector of a row needs no narrower load."""
    N, C = z.shape
    padded = -(-C // multiple) * multiple
    if z.stride(1) != 1 or z.stride(0) < padded:
        return C
    end = z.storage_offset() + (N - 1) * z.stride(0) + padded
    return padded if end * z.element_size() <= z.untyped_storage().nbytes() else C


def _split(value: Scalar) -> tuple[Scalar, bool]:
    return (value, True) if isinstance(value, Tensor) else (float(value), False)


def launch(
    logits: Sequence[Tensor],  # K tensors (N, C) on one device
    labels: Tensor,  # (N,)
    options: Options,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    peer_weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    grads: Sequence[Tensor] = (),  # K tensors (N, C) to be written, or () for no gradient
    want_stats: bool = False,
    upstream: Tensor | None = None,
    tile: Tile | None = None,
    max_programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses, (K,) or (K, N), and packed statistics (S,), both float32; fills `grads`."""
    K, (N, C), device = len(logits), logits[0].shape, logits[0].device
    tile = tile or register_tile(K, C)
    S = stats_size(K)
    shape = (K, N) if options.reduction == "none" else (K,)
    losses = torch.empty(shape, dtype=torch.float32, device=device)
    stats = torch.empty(S, dtype=torch.float32, device=device)
    programs = max(min(triton.cdiv(N, tile.rows), max_programs or _max_programs(device)), 1)
    partials = torch.empty((programs, S), dtype=torch.float32, device=device)
    temperature, t_pointer = _split(temperature)
    ce_weight, ce_pointer = _split(ce_weight)
    kl_weight, kl_pointer = _split(kl_weight)
    register_rows[(programs,)](
        tuple(logits), tuple(grads), labels, peer_weights, class_weight,
        losses, stats, partials, _counters(device).take(), None,
        N, labels.stride(0), options.ignore_index,
        ce_weight, kl_weight, temperature, float(options.label_smoothing),
        K=K, C=C,
        STRIDES=tuple((z.stride(0), z.stride(1), grads[k].stride(0) if grads else 0)
                      for k, z in enumerate(logits)),
        READABLE=tuple(_readable(z) for z in logits),
        WRITABLE=C,
        ROWS=tile.rows, BLOCK_C=tile.block_c, S=S, PROGRAMS_BLOCK=max(1, min(64, 2048 // S)),
        NEED_GRAD=bool(grads), STATS=want_stats, REDUCTION=options.reduction,
        TARGET=options.target, GATE=options.gate, EDGE=default_edge(K, options.gate),
        TEMPERED=t_pointer or temperature != 1.0, SMOOTHED=options.label_smoothing != 0.0,
        MIMIC_IGNORED=options.mimic_ignored,
        CE_POINTER=ce_pointer, KL_POINTER=kl_pointer, T_POINTER=t_pointer,
        num_warps=tile.warps,
    )  # fmt: skip
    return losses, stats
