"""Checks of what `linear_mutual_loss` takes beside the options: layers, and given teachers.

As in `loss_checks`, nothing here waits for a device. Raise ValueError and TypeError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastdml_kernels import Call, Options
from fastdml_kernels.given_teachers import GivenTeachers
from torch import Tensor

from fastdml.loss_checks import LOGIT_DTYPES, check_students, refuse_unusual


def check_layers(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """K linear layers and their inputs: tensors (N, D_k), (C, D_k) and (C,) or None."""
    hiddens, weights = _matrices("hidden", hidden), _matrices("weight", weight)
    K, C = len(hiddens), weights[0].shape[0]
    biases = [None] * K if bias is None else list(bias)
    refuse_unusual("bias", biases)
    if len(weights) != K or len(biases) != K:
        raise ValueError(
            f"{K} hidden, {len(weights)} weight and {len(biases)} bias tensors: one of each a peer"
        )
    for k, (h, w, b) in enumerate(zip(hiddens, weights, biases, strict=True)):
        if h.shape[1] != w.shape[1] or w.shape[0] != C or (b is not None and b.shape != (C,)):
            found = None if b is None else tuple(b.shape)
            raise ValueError(
                f"peer {k}: hidden {tuple(h.shape)}, weight {tuple(w.shape)}, bias {found}: "
                f"give (N, D), ({C}, D) and ({C},)"
            )
        given = [t for t in (h, w, b) if t is not None]
        if len({t.dtype for t in given}) != 1:
            raise TypeError(
                f"peer {k}: hidden, weight and bias of {', '.join(str(t.dtype) for t in given)}: "
                "cast them to one dtype (a fused layer is not touched by autocast)"
            )
        if len({t.device for t in given}) != 1:
            raise ValueError(
                f"peer {k}: hidden, weight and bias on {', '.join(str(t.device) for t in given)}: "
                "bring them to one device"
            )
    return hiddens, weights, biases


def _matrices(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """K tensors of two dimensions, from such or from one of three."""
    tensors = given = [value] if isinstance(value, Tensor) else list(value)
    refuse_unusual(name, given)
    if isinstance(value, Tensor):
        tensors = list(value.unbind()) if value.dim() == 3 else []
    if not tensors or any(not isinstance(t, Tensor) or t.dim() != 2 for t in tensors):
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in given]
        shown = shapes[0] if isinstance(value, Tensor) else shapes
        raise ValueError(
            f"{name} {shown}: give K tensors, each 2-d, or one 3-d tensor; flatten(0, -2) makes "
            "rows of (batch, length, D)"
        )
    return tensors


def check_given(
    teacher_logits: Tensor | Sequence[Tensor] | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
    call: Call,
    logits: Sequence[Tensor],  # K of (N, C): of the peers with layers
    mask: int | None,  # how many peers the students, given as a mask, speak of
) -> tuple[GivenTeachers, list[torch.dtype]]:
    """Teachers beyond the peers that have layers, and the dtype of each one's logits."""
    (N, C), device = logits[0].shape, logits[0].device
    each = _given_logits(teacher_logits)
    for z in each:
        if z.shape != (N, C):
            raise ValueError(
                f"teacher_logits of shape {tuple(z.shape)} for rows and classes of ({N}, {C}): "
                "give (N, C), (T, N, C), or a list of T (N, C); flatten(0, -2) makes rows of "
                "(batch, length, C)"
            )
        if z.dtype not in LOGIT_DTYPES:
            raise TypeError(f"teacher_logits of {z.dtype}: give logits of a floating dtype")
        _check_given_device("teacher_logits", z, device)
    dtypes = [z.dtype for z in each]
    log_probs = indices = None
    if teacher_topk is not None:
        log_probs, indices = _check_topk(teacher_topk, call.options, N, C, device)
        dtypes.append(logits[0].dtype if logits[0].dtype == torch.float64 else torch.float32)
    if dtypes:  # students are peers with layers
        check_students(call.options.students, len(logits), mask)
    return GivenTeachers(each, log_probs, indices), dtypes


def _given_logits(teacher_logits: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if teacher_logits is None:
        return []
    if isinstance(teacher_logits, Tensor):
        stacked = teacher_logits.dim() == 3
        each = list(teacher_logits.unbind()) if stacked else [teacher_logits]
    else:
        each = list(teacher_logits)
    refuse_unusual("teacher_logits", each)
    for z in each:
        if not isinstance(z, Tensor):
            raise TypeError(
                f"teacher_logits of type {type(z).__name__}: give tensors (torch.from_numpy makes "
                "one of a mapped array without copying it)"
            )
    return each


def _check_topk(
    teacher_topk: tuple[Tensor, Tensor], options: Options, N: int, C: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    pair = tuple(teacher_topk)
    if len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
        raise TypeError("teacher_topk: give (log_probs, indices), two tensors (N, k)")
    log_probs, indices = pair
    shapes = [tuple(t.shape) for t in pair]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != N:
        raise ValueError(f"teacher_topk of shapes {shapes} for N = {N} rows: give (N, k) twice")
    if not 1 <= shapes[0][1] <= C:
        raise ValueError(f"teacher_topk of {shapes[0][1]} classes of C = {C}: give 1 to {C}")
    if log_probs.dtype not in LOGIT_DTYPES or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"teacher_topk of {log_probs.dtype} and {indices.dtype}: give floating log_probs and "
            "int64 or int32 indices"
        )
    for t in pair:
        _check_given_device("teacher_topk", t, device)
    if options.divergence in ("reverse", "jeffreys"):
        raise ValueError(
            f"divergence={options.divergence!r} with teacher_topk: it is infinite where a teacher "
            "gives a class probability 0, as one of top-k does; use 'forward', or 'jsd' with "
            "jsd_beta below 1"
        )
    return log_probs, indices


def _check_given_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device and tensor.device.type != "cpu":
        raise ValueError(
            f"{name} on {tensor.device}, hidden on {device}: give it there or in the host's memory"
        )
