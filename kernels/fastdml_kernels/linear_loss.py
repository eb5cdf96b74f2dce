"""The last linear layers and the mutual loss together: (K, N, C) logits never exist.

Rows go through a chunk at a time: logits by matrix products, losses and their gradients
by the fused loss, gradients of hidden, weight and bias by matrix products; then the chunk's
memory is used again. All of it happens in the forward pass, so that the backward only scales. For a
language model's vocabulary the logits are most of the memory of a step (Hsu et al. 2024, Liger).

As in `loss_op`, eager calls of plain tensors compute at once and tracers see an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .counters import prepare
from .linear_grads import add_product
from .linear_grads import new_grads as new_layer_grads
from .loss_op import (
    CALL_SCHEMA,
    NO_SECOND_DERIVATIVE,
    Call,
    by_operator,
    compute,
    flatten,
    loss_dtype,
    new_grads,
    refuse_transforms,
    unflatten,
)
from .options import Scalar

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # of all peers' logits at a time
NAME = "linear_mutual_loss"


def _per(count: Tensor, unit: Tensor, weight: Scalar) -> tuple[Scalar, Tensor]:
    """A term's factor, weight * unit / count, with which its sum divided by `unit` is its mean over
    `count`; and a number to add to its losses, (): NaN where the count is 0, as that mean is, else
    0. Both are 0 for a weight of 0."""
    empty = count == 0
    unknown = torch.where(empty & (weight != 0), torch.nan, torch.zeros_like(unit))
    if not isinstance(weight, Tensor):
        return (torch.where(empty, 0.0, weight * (unit / count)) if weight else 0.0), unknown
    return torch.where(empty | (weight == 0), 0.0, weight * (unit / count)), unknown


def _denominators(call: Call, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The denominators of the cross-entropy's and the KL's means: 0-d, on the device."""
    labelled = call.labels != call.options.ignore_index
    rows = labelled.sum().to(dtype)
    weight = rows
    if call.class_weight is not None:
        C = call.class_weight.shape[0]
        known = labelled & (call.labels >= 0) & (call.labels < C)
        of_label = call.class_weight.to(dtype)[call.labels.clamp(0, C - 1)]
        weight = torch.where(known, of_label, 0.0).sum()
    if call.options.mimic_ignored:
        # a batch without any label teaches by the KL term alone
        return torch.where(rows == 0, torch.ones_like(weight), weight), torch.full_like(rows, N)
    return weight, rows


def _compute(
    hidden: Sequence[Tensor],  # K tensors (N, D_k)
    weight: Sequence[Tensor],  # K tensors (C, D_k)
    bias: Sequence[Tensor | None],  # K tensors (C,), or None
    call: Call,
    chunk_rows: int | None,
    needs: Sequence[int],  # which gradients are wanted, in the order of the arguments
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Losses (K,), the gradients of their sum times `unit`, and `unit`, 0-d. For a mean that is the
    number of rows: the backward divides by it, since gradients of a mean underflow in float16."""
    if call.sample_weight is not None:
        raise NotImplementedError("sample_weight of linear_mutual_loss")
    K, (N, _), C = len(hidden), hidden[0].shape, weight[0].shape[0]
    dtype, device = loss_dtype(hidden), hidden[0].device
    unit = torch.ones((), dtype=dtype, device=device)
    losses = torch.zeros(K, dtype=dtype, device=device)
    if call.options.reduction == "mean":
        ce_count, kl_count = _denominators(call, N, dtype)
        unit = kl_count.clamp(min=1)
        ce_weight, unknown = _per(ce_count, unit, call.ce_weight)
        losses += unknown
        kl_weight, unknown = _per(kl_count, unit, call.kl_weight)
        if K > 1:
            losses += unknown
        call = call._replace(
            options=call.options.summed(), ce_weight=ce_weight, kl_weight=kl_weight
        )
    if chunk_rows is None:
        row_bytes = sum(h.element_size() for h in hidden) * C
        chunk_rows = max(1, CHUNK_BYTES[device.type] // row_bytes)
    grads = new_layer_grads(hidden, weight, bias, needs)
    students = [k for k in range(K) if any(needs[k::K])]
    # the layers compute in the dtypes of their tensors, under autocast too
    with torch.autocast(device.type, enabled=False):
        for start in range(0, max(N, 1), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = [
                torch.nn.functional.linear(h[rows], w, b)
                for h, w, b in zip(hidden, weight, bias, strict=True)
            ]
            part = call._replace(labels=call.labels[rows])
            slopes = new_grads(logits, students)
            sums, _ = compute(logits, part, slopes)
            losses += sums
            for k in students:
                slope = cast(Tensor, slopes[k])
                of_hidden, of_weight, of_bias = grads[k], grads[K + k], grads[2 * K + k]
                if of_hidden is not None:
                    torch.mm(slope, weight[k], out=of_hidden[rows])
                if of_weight is not None:
                    add_product(of_weight, slope, hidden[k][rows])
                if of_bias is not None:
                    of_bias += slope.sum(0, dtype=of_bias.dtype)
    return losses / unit, unit, grads


class _EagerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, chunk_rows: int | None, needs: list[bool],
                *tensors: Any) -> Tensor:  # fmt: skip
        """`tensors`: hidden, weight and bias of the K peers, a bias None where there is none."""
        K = len(tensors) // 3
        losses, ctx.unit, ctx.grads = _compute(
            tensors[:K], tensors[K : 2 * K], tensors[2 * K :], call, chunk_rows, needs
        )
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
        refuse_transforms(NAME, (upstream,))
        if ctx.grads is None:
            raise RuntimeError(f"{NAME} keeps its gradients for one backward; call it again for "
                               "another")  # fmt: skip
        grads, ctx.grads = ctx.grads, None
        factors = (upstream / ctx.unit).split(1) * 3  # (1,): a 0-d one would become float16
        return None, None, None, *(
            None if g is None else g.mul_(factor).to(dtype)
            for g, factor, dtype in zip(grads, factors, ctx.dtypes, strict=True)
        )  # fmt: skip


# ---- the operator that compiled code sees

torch.library.define(
    f"fastdml::{NAME}",
    # biased and needs are bools as ints: torch.jit.trace does not support lists of bools
    "(Tensor[] hidden, Tensor[] weight, Tensor[] bias, int[] biased, int? chunk_rows, "
    f"int[] needs, {CALL_SCHEMA}) -> (Tensor, Tensor, Tensor[])",
)


def _of_each(bias: Sequence[Tensor], biased: Sequence[int]) -> list[Tensor | None]:
    """The biases of all K peers, with None for those without, from the list of those that exist: an
    operator that autograd differentiates takes no list of optional tensors."""
    given = iter(bias)
    return [next(given) if has else None for has in biased]


def _compute_flat(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    chunk_rows: int | None,
    needs: Sequence[int],
    *flat: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    losses, unit, grads = _compute(
        hidden, weight, _of_each(bias, biased), unflatten(*flat), chunk_rows, needs
    )
    return losses, unit, [g for g in grads if g is not None]


for _device in ("cpu", "cuda"):
    torch.library.impl(f"fastdml::{NAME}", _device, _compute_flat)


@torch.library.register_fake(f"fastdml::{NAME}")
def _fake(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    chunk_rows: int | None,
    needs: Sequence[int],
    *flat: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype, z = loss_dtype(hidden), hidden[0]
    prepare(z.device)
    grads = new_layer_grads(hidden, weight, _of_each(bias, biased), needs)
    kept = [g for g in grads if g is not None]
    return z.new_empty(len(hidden), dtype=dtype), z.new_empty((), dtype=dtype), kept


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, biased, _, needs = inputs[:6]
    _, unit, grads = output
    ctx.mark_non_differentiable(unit)
    ctx.inputs, ctx.biased, ctx.needs = len(inputs), biased, needs
    ctx.dtypes = [t.dtype for t in (*hidden, *weight, *bias)]
    ctx.save_for_backward(unit, *grads)


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
    unit, *grads = ctx.saved_tensors
    K, factors = len(ctx.biased), (upstream / unit).split(1) * 3
    rest, dtypes, given = iter(grads), iter(ctx.dtypes), [True] * 2 * K + list(ctx.biased)
    out = []
    for has, need, factor in zip(given, ctx.needs, factors, strict=True):
        if has:
            dtype = next(dtypes)
            out.append((next(rest) * factor).to(dtype) if need else None)
    return out[:K], out[K : 2 * K], out[2 * K :], *(None,) * (ctx.inputs - 3)


torch.library.register_autograd(f"fastdml::{NAME}", _backward, setup_context=_setup_context)


def linear_mutual_loss(
    hidden: Sequence[Tensor],  # K tensors (N, D_k)
    weight: Sequence[Tensor],  # K tensors (C, D_k)
    bias: Sequence[Tensor | None],  # K tensors (C,), or None
    call: Call,
    chunk_rows: int | None = None,
) -> Tensor:
    """Losses (K,), differentiable in hidden, weight and bias. Arguments are taken as checked.

    chunk_rows: rows whose logits exist at a time, by `CHUNK_BYTES` unless given. Raises
    RuntimeError under torch.func's transforms, in forward mode and in a second backward, and
    ValueError on the CPU for a label that is no class."""
    tensors = (*hidden, *weight, *bias)
    enabled = torch.is_grad_enabled()
    needs = [enabled and t is not None and t.requires_grad for t in tensors]
    given = [t for t in tensors if t is not None]
    if not torch.compiler.is_compiling():
        refuse_transforms(NAME, given)
    if by_operator((*given, *call.tensors())):
        biases, biased = [b for b in bias if b is not None], [int(b is not None) for b in bias]
        return torch.ops.fastdml.linear_mutual_loss(
            hidden, weight, biases, biased, chunk_rows, list(map(int, needs)), *flatten(call)
        )[0]
    return _EagerLinear.apply(call, chunk_rows, needs, *tensors)
