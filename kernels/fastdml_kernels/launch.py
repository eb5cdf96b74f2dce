"""Launches the loss kernel of a shape: buffers, arguments, grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .counters import counters_of
from .coupled_rows import coupled_rows
from .label_counts import label_counts
from .launch_plan import Plans, beyond_int32, not_current
from .occupancy import limits_of, multiprocessors, resident_programs
from .options import SOFT_GATES, Options, Scalar, default_edge
from .register_rows import register_rows
from .row_alignment import misaligned
from .stats_layout import stats_layout
from .tiles import (
    INTERPRETER_PROGRAMS,
    Regime,
    Tile,
    architecture,
    choose,
    compiler_options,
    lane,
    programs_per_sm,
)
from .torch_private import current_stream
from .triton_private import (
    Direct,
    compiled_for,
    direct_launch,
    launches_alone,
    registers_and_shared,
)
from .wide_rows import wide_rows

# Up to so many labels every program counts them itself; beyond, an earlier launch does it once.
COUNT_IN_KERNEL = 4096
# Losses, statistics and partial sums share an allocation up to this size. A loss that is kept (in a
# list, for a log) keeps it all.
SHARED = 1024  # float32
ALIGNED = 4  # float32 of 16 bytes
VECTOR = 8  # classes that are read at once at the end of a row
# The kernels' run-time arguments, of which each kernel has most.
NAMES = (
    "logits", "grads", "labels", "losses", "stats", "partials", "counter", "scratch",
    "peer_weights", "class_weight", "sample_weight", "upstream", "counts", "ce_weight", "kl_weight",
    "temperature", "N", "label_stride", "u_stride_k", "u_stride_n", "ignore_index",
    "label_smoothing",
)  # fmt: skip


def _is_coupled(K: int, options: Options, gradient: bool) -> bool:
    """Whether rows that are wide need `coupled_rows`."""
    if K == 1:
        return False
    if options.target == "ensemble_logits" or options.divergence == "jsd":
        return True
    if gradient and not options.detach_targets:
        return True
    gated_or_mixed = options.target != "peers" or options.gate != "none"
    return options.divergence != "forward" and gated_or_mixed


def _readable(z: Tensor, multiple: int = VECTOR) -> int:
    """Columns of each row that may be read: C rounded up where the storage holds the padding, so
    that the last vector of a row needs no narrower load."""
    N, C = z.shape
    padded = -(-C // multiple) * multiple
    if z.stride(1) != 1 or z.stride(0) < padded:
        return C
    end = z.storage_offset() + (N - 1) * z.stride(0) + padded
    return padded if end * z.element_size() <= z.untyped_storage().nbytes() else C


def _all_readable(
    logits: Sequence[Tensor], rows: Sequence[tuple[Any, tuple[int, ...]]], C: int
) -> tuple[int, ...] | None:
    """`_readable` of each, or None where it is C by their strides alone."""
    if C % VECTOR == 0:
        return None
    padded = C + -C % VECTOR
    for _, strides in rows:
        if strides[0] >= padded:
            return tuple(map(_readable, logits))
    return None


def _loads_vectors(z: Tensor) -> bool:
    """Whether every row begins where a load of 16 bytes may."""
    return z.stride(1) == 1 and z.stride(0) * z.element_size() % 16 == 0


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
    sample_weight: Tensor | None = None,
    grads: Sequence[Tensor | None] = (),
    want_stats: bool = False,
    upstream: Tensor | None = None,
    counts: Tensor | None = None,  # of the labels, where an earlier launch has counted them
    regime: Regime,
    tile: Tile,
    programs: int = 1,
    counter: Tensor | None = None,  # None takes one
) -> tuple[Any, dict[str, Any], int]:
    """The kernel, its arguments by name, outputs and buffers included, and its warps."""
    K, (N, C), device = len(logits), logits[0].shape, logits[0].device
    layout = stats_layout(K)
    students = tuple(k for k, g in enumerate(grads) if g is not None)
    of_peers = grads or (None,) * K
    shape = (K, N) if options.reduction == "none" else (K,)
    temperature, t_pointer = _split(temperature)
    ce_weight, ce_pointer = _split(ce_weight)
    kl_weight, kl_pointer = _split(kl_weight)
    named = dict(
        logits=tuple(logits), grads=tuple(g for g in grads if g is not None), labels=labels,
        peer_weights=peer_weights, class_weight=class_weight, sample_weight=sample_weight,
        losses=torch.empty(shape, dtype=torch.float32, device=device),
        stats=torch.empty(layout.size, dtype=torch.float32, device=device),
        partials=torch.empty((programs, layout.size), dtype=torch.float32, device=device),
        counter=counters_of(device).take() if counter is None else counter,
        counts=counts,
        N=N, label_stride=labels.stride(0), ignore_index=options.ignore_index,
        ce_weight=ce_weight, kl_weight=kl_weight, temperature=temperature,
        label_smoothing=float(options.label_smoothing),
        K=K, C=C, STUDENTS=students,
        STRIDES=tuple((*z.stride(), 0 if g is None else g.stride(0))
                      for z, g in zip(logits, of_peers, strict=True)),
        READABLE=tuple(_readable(z) for z in logits),
        BLOCK_C=tile.block_c, LAYOUT=layout, PROGRAMS_BLOCK=max(1, min(64, 2048 // layout.size)),
        NEED_GRAD=bool(students), STATS=want_stats, REDUCTION=options.reduction,
        TARGET=options.target, GATE=options.gate, EDGE=default_edge(K, options.gate),
        DIVERGENCE=options.divergence,
        TEMPERED=t_pointer or temperature != 1.0, SMOOTHED=options.label_smoothing != 0.0,
        MIMIC_IGNORED=options.mimic_ignored,
        CE_POINTER=ce_pointer, KL_POINTER=kl_pointer, T_POINTER=t_pointer,
    )  # fmt: skip
    if regime == "register":
        own = dict(ROWS=tile.rows, JSD_BETA=options.jsd_beta)
        return register_rows, named | own, tile.warps
    wide = dict(
        upstream=upstream,
        u_stride_k=0 if upstream is None else upstream.stride(0),
        u_stride_n=upstream.stride(1) if upstream is not None and upstream.dim() == 2 else 0,
        PEERS=triton.next_power_of_2(max(K, 2)), LANE=lane(tile, logits),
        ADJACENT=all(_loads_vectors(z) for z in logits),
    )  # fmt: skip
    soft = options.gate in SOFT_GATES
    room = lambda size: torch.empty((programs, size), dtype=torch.float32, device=device)  # noqa: E731
    if not _is_coupled(K, options, bool(students)):
        walk = dict(
            scratch=room(K * K) if soft else None,
            STAGES=tile.stages, BACK_STAGES=tile.back_stages,
        )  # fmt: skip
        return wide_rows, named | wide | walk, tile.warps
    coupled = dict(
        scratch=room((4 if soft else 3) * K * K),
        JSD_BETA=options.jsd_beta, DETACH=options.detach_targets,
    )  # fmt: skip
    return coupled_rows, named | wide | coupled, tile.warps


class _Plan(NamedTuple):
    """What the launches of a signature have in common."""

    direct: Direct | None
    regime: Regime
    tile: Tile
    most: int  # programs
    size: int  # of the packed statistics
    scratch: int  # numbers a program

    def programs(self, N: int) -> int:
        return max(1, min(-(-N // self.tile.rows), self.most))


_PLANS: Plans[_Plan] = Plans()


def _most_programs(logits: Sequence[Tensor], regime: Regime, tile: Tile, compiled: Any) -> int:
    """The programs that the device holds at once, or fewer (`programs_per_sm`)."""
    device = logits[0].device
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    resident = None
    if compiled is not None:
        used = registers_and_shared(compiled)
        resident = resident_programs(*used, tile.warps, limits_of(device))
    row_bytes = sum(z.element_size() for z in logits) * logits[0].shape[1]
    return programs_per_sm(regime, tile, row_bytes, resident) * multiprocessors(device)


def _make_plan(
    logits: Sequence[Tensor], labels: Tensor, options: Options, regime: Regime | None,
    tile: Tile | None, max_programs: int | None, **rest: Any,
) -> _Plan:  # fmt: skip
    regime, tile = choose(
        len(logits), logits[0].shape[1], options,
        gradient=any(g is not None for g in rest["grads"]),
        stats=rest["want_stats"], upstream=rest["upstream"], regime=regime, tile=tile,
        size=logits[0].element_size(), arch=architecture(logits[0].device),
    )  # fmt: skip
    kernel, named, warps = arguments(
        logits, labels, options, regime=regime, tile=tile,
        counter=counters_of(logits[0].device).example(), **rest,
    )  # fmt: skip
    compiled = compiled_for(kernel, named, compiler_options(warps, torch.version.hip is None))
    most = max_programs or _most_programs(logits, regime, tile, compiled)
    scratch = named.get("scratch")
    scratch = 0 if scratch is None else scratch.shape[1]
    direct = direct_launch(kernel, compiled, NAMES, named)
    return _Plan(direct, regime, tile, most, named["LAYOUT"].size, scratch)


def _results(
    shape: tuple[int, ...], size: int, programs: int, want_stats: bool, device: torch.device
) -> tuple[Tensor, Tensor | None, tuple[int, int, int], Tensor]:
    """Losses; statistics, if wanted; the addresses of both and of the programs' sums; and what
    holds these."""
    count = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    behind_losses = -(-count // ALIGNED) * ALIGNED
    behind_stats = behind_losses + size
    sums = programs * size
    if behind_stats > SHARED:
        losses = torch.empty(shape, dtype=torch.float32, device=device)
        packed = torch.empty(size, dtype=torch.float32, device=device)
        partials = torch.empty(sums, dtype=torch.float32, device=device)
        at = losses.data_ptr(), packed.data_ptr(), partials.data_ptr()
        return losses, packed if want_stats else None, at, partials
    shared = behind_stats + sums <= SHARED
    memory = torch.empty(behind_stats + sums * shared, dtype=torch.float32, device=device)
    start = memory.data_ptr()
    partials, at_sums = memory, start + 4 * behind_stats
    if not shared:
        partials = torch.empty(sums, dtype=torch.float32, device=device)
        at_sums = partials.data_ptr()
    # Neither is a view, which autograd would not let anyone change in place (`losses += penalty`).
    stats = memory[behind_losses:behind_stats].data if want_stats else None
    return memory.resize_(*shape), stats, (start, start + 4 * behind_losses, at_sums), partials


def _optional(values: Sequence[Tensor | Scalar | None]) -> tuple[list[Any], list[Any]]:
    """Arguments that may be tensors as a launcher takes them, and what they are."""
    bound: list[Any] = []
    kinds: list[Any] = []
    for value in values:
        if value is None or type(value) is float:
            bound.append(value)
            kinds.append(type(value))
        elif isinstance(value, Tensor):
            bound.append(value.data_ptr())
            kinds.append(value.dtype)
        else:
            bound.append(float(value))
            kinds.append(float)
    return bound, kinds


def launch(
    logits: Sequence[Tensor],  # K tensors (N, C) on one device
    labels: Tensor,  # (N,)
    options: Options,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    peer_weights: Tensor | None = None,  # contiguous
    class_weight: Tensor | None = None,  # contiguous
    sample_weight: Tensor | None = None,  # (N,), contiguous
    grads: Sequence[Tensor | None] = (),  # K tensors (N, C) to be written, None for a peer that
    # only teaches; or () for no gradient
    want_stats: bool = False,
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
    regime: Regime | None = None,
    tile: Tile | None = None,
    max_programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Losses, (K,) or (K, N), and packed statistics (None if not wanted), both float32; fills
    `grads`.

    `regime`, `tile` and `max_programs` are chosen by shape unless given; the rest as in
    `cpu.mutual_loss_cpu`. Raises ValueError as `choose` does.
    """
    K, (N, C), device = len(logits), logits[0].shape, logits[0].device
    if not_current(device):
        with torch.cuda.device(device.index):
            return launch(
                logits, labels, options, temperature=temperature, ce_weight=ce_weight,
                kl_weight=kl_weight, peer_weights=peer_weights, class_weight=class_weight,
                sample_weight=sample_weight, grads=grads, want_stats=want_stats, upstream=upstream,
                regime=regime, tile=tile, max_programs=max_programs,
            )  # fmt: skip
    counts, chosen = None, (regime, tile, max_programs)
    of_logits = tuple([z.data_ptr() for z in logits])
    of_grads = tuple([g.data_ptr() for g in grads if g is not None])
    # which peers learn, where it is neither all nor none
    students = len(of_grads) == K or tuple([g is not None for g in grads])
    if N > COUNT_IN_KERNEL and of_grads and options.reduction == "mean":
        counts = label_counts(labels, class_weight, sample_weight, options.ignore_index, C)
    given = (
        peer_weights, class_weight, sample_weight, upstream, counts, ce_weight, kl_weight,
        temperature,
    )  # fmt: skip
    optional, kinds = _optional(given)
    of_labels = labels.data_ptr()
    rows = [(t.dtype, t.stride()) for t in (*logits, *grads) if t is not None]
    label_stride, u_stride_k, u_stride_n = labels.stride(0), 0, 0
    if upstream is not None:
        u_stride_k, u_stride_n = (*upstream.stride(), 0)[:2]
    signature = (
        device, options, C, want_stats, chosen, K, students, tuple(rows), labels.dtype,
        tuple(kinds), optional[7] == 1.0, _all_readable(logits, rows, C),
        misaligned((*of_logits, *of_grads), rows), (optional[1] or 0) & 15 == 0,
        beyond_int32(N, label_stride, u_stride_k, u_stride_n), launches_alone(),
    )  # fmt: skip
    plan = _PLANS.get(signature)
    if plan is None or plan.direct is None:
        named: dict[str, Any] = dict(
            grads=grads, want_stats=want_stats, upstream=upstream, counts=counts,
            temperature=temperature, ce_weight=ce_weight, kl_weight=kl_weight,
            peer_weights=peer_weights, class_weight=class_weight, sample_weight=sample_weight,
        )  # fmt: skip
        if plan is None:
            plan = _make_plan(logits, labels, options, *chosen, **named)
            _PLANS.add(signature, plan)
        if plan.direct is None:
            return _launch_by_jit(plan, logits, labels, options, **named)
    programs = plan.programs(N)
    stream = current_stream(device.index)
    shape = (K, N) if options.reduction == "none" else (K,)
    losses, stats, results, _held = _results(shape, plan.size, programs, want_stats, device)
    counter = counters_of(device).take(stream)  # held: it may be a tensor of a capture's own
    scratch = None
    if plan.scratch:
        scratch = torch.empty(programs * plan.scratch, dtype=torch.float32, device=device)
    plan.direct(
        (programs, 1, 1), stream,
        (
            of_logits, of_grads, of_labels, *results, counter.data_ptr(),
            None if scratch is None else scratch.data_ptr(), *optional,
            N, label_stride, u_stride_k, u_stride_n, options.ignore_index, options.label_smoothing,
        ),
    )  # fmt: skip
    return losses, stats


def _launch_by_jit(
    plan: _Plan, logits: Sequence[Tensor], labels: Tensor, options: Options, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    programs = plan.programs(logits[0].shape[0])
    kernel, named, warps = arguments(
        logits, labels, options, regime=plan.regime, tile=plan.tile, programs=programs, **rest
    )
    kernel[(programs,)](**named, **compiler_options(warps, torch.version.hip is None))
    return named["losses"], named["stats"] if rest["want_stats"] else None
