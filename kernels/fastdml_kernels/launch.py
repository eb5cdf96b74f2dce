"""Launches the kernel for a shape: arguments, grid, buffers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .counters import counters_of
from .coupled_rows import coupled_rows
from .label_counts import label_counts
from .options import Options, Scalar, default_edge
from .register_rows import register_rows
from .stats_layout import stats_layout
from .tiles import (
    INTERPRETER_PROGRAMS,
    Regime,
    Tile,
    architecture,
    choose,
    compiler_options,
    programs_per_sm,
)
from .wide_rows import wide_rows

# Up to so many labels every program counts them itself; beyond, an earlier launch does it once.
COUNT_IN_KERNEL = 4096


def _is_coupled(K: int, options: Options, gradient: bool) -> bool:
    """Whether rows that are wide need `coupled_rows`."""
    mutual = options.symmetric or options.target == "ensemble_logits"
    return K > 1 and (mutual or (gradient and not options.detach_targets))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    """A scalar as a kernel takes it, and whether that is a pointer."""
    return (value, True) if isinstance(value, Tensor) else (float(value), False)


def arguments(
    logits: Sequence[Tensor],
    labels: Tensor,
    options: Options,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    peer_weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    grads: Sequence[Tensor] = (),
    want_stats: bool = False,
    upstream: Tensor | None = None,
    regime: Regime,
    tile: Tile,
    programs: int = 1,
) -> tuple[Any, dict[str, Any], int]:
    """The kernel, its arguments by name, outputs and buffers included, and its warps."""
    K, (N, C), device = len(logits), logits[0].shape, logits[0].device
    layout = stats_layout(K)
    shape = (K, N) if options.reduction == "none" else (K,)
    temperature, t_pointer = _split(temperature)
    ce_weight, ce_pointer = _split(ce_weight)
    kl_weight, kl_pointer = _split(kl_weight)
    counted = N > COUNT_IN_KERNEL and bool(grads) and options.reduction == "mean"
    named = dict(
        logits=tuple(logits), grads=tuple(grads), labels=labels,
        peer_weights=peer_weights, class_weight=class_weight,
        losses=torch.empty(shape, dtype=torch.float32, device=device),
        stats=torch.empty(layout.size, dtype=torch.float32, device=device),
        partials=torch.empty((programs, layout.size), dtype=torch.float32, device=device),
        counter=counters_of(device).take(),
        counts=label_counts(labels, class_weight, options.ignore_index, C) if counted else None,
        N=N, label_stride=labels.stride(0), ignore_index=options.ignore_index,
        ce_weight=ce_weight, kl_weight=kl_weight, temperature=temperature,
        label_smoothing=float(options.label_smoothing),
        K=K, C=C,
        STRIDES=tuple((z.stride(0), z.stride(1), grads[k].stride(0) if grads else 0)
                      for k, z in enumerate(logits)),
        READABLE=tuple(_readable(z) for z in logits),
        BLOCK_C=tile.block_c, LAYOUT=layout, PROGRAMS_BLOCK=max(1, min(64, 2048 // layout.size)),
        NEED_GRAD=bool(grads), STATS=want_stats, REDUCTION=options.reduction,
        TARGET=options.target, GATE=options.gate, EDGE=default_edge(K, options.gate),
        TEMPERED=t_pointer or temperature != 1.0, SMOOTHED=options.label_smoothing != 0.0,
        MIMIC_IGNORED=options.mimic_ignored,
        CE_POINTER=ce_pointer, KL_POINTER=kl_pointer, T_POINTER=t_pointer,
    )  # fmt: skip
    if regime == "register":
        return register_rows, named | dict(ROWS=tile.rows), tile.warps
    wide = dict(
        upstream=upstream,
        u_stride_k=0 if upstream is None else upstream.stride(0),
        u_stride_n=upstream.stride(1) if upstream is not None and upstream.dim() == 2 else 0,
        PEERS=triton.next_power_of_2(max(K, 2)),
        STAGES=tile.stages, BACK_STAGES=tile.back_stages,
    )  # fmt: skip
    if not _is_coupled(K, options, bool(grads)):
        return wide_rows, named | wide, tile.warps
    coupled = dict(
        scratch=torch.empty((programs, 3 * K * K), dtype=torch.float32, device=device),
        SYMMETRIC=options.symmetric, DETACH=options.detach_targets,
    )  # fmt: skip
    return coupled_rows, named | wide | coupled, tile.warps


def launch(
    logits: Sequence[Tensor],  # K tensors (N, C) on one device
    labels: Tensor,  # (N,)
    options: Options,
    *,
    grads: Sequence[Tensor] = (),  # K tensors (N, C) to be written, or () for no gradient
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
    regime: Regime | None = None,
    tile: Tile | None = None,
    max_programs: int | None = None,
    want_stats: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """Losses, (K,) or (K, N), and packed statistics, both float32; fills `grads`.

    `regime`, `tile` and `max_programs` are chosen by shape unless given; `rest` as in
    `cpu.mutual_loss_cpu`. Raises ValueError as `choose` does.
    """
    K, (N, C), device = len(logits), logits[0].shape, logits[0].device
    regime, tile = choose(
        K, C, options, gradient=bool(grads), stats=want_stats, upstream=upstream, regime=regime,
        tile=tile, size=logits[0].element_size(), arch=architecture(device),
    )  # fmt: skip
    if max_programs is None:
        max_programs = INTERPRETER_PROGRAMS
        if device.type == "cuda":
            row_bytes = sum(z.element_size() for z in logits) * C
            max_programs = programs_per_sm(regime, tile, row_bytes) * _multiprocessors(device)
    programs = max(1, min(triton.cdiv(N, tile.rows), max_programs))
    with torch.cuda.device_of(logits[0]):
        kernel, named, warps = arguments(
            logits, labels, options, grads=grads, upstream=upstream, regime=regime, tile=tile,
            programs=programs, want_stats=want_stats, **rest,
        )  # fmt: skip
        kernel[(programs,)](**named, **compiler_options(warps, torch.version.hip is None))
    return named["losses"], named["stats"]
