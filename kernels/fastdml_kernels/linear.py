"""The last linear layers and the mutual loss together: (K, N, C) logits never exist.

Rows go through a chunk at a time: logits by matrix products, losses and their gradients
by the fused loss, gradients of hidden, weight and bias by matrix products; then the chunk's
memory is used again. All of it happens in the forward pass, so that the backward only scales. For a
language model's vocabulary the logits are most of the memory of a step (Hsu et al. 2024, Liger).

As in `op`, eager calls compute at once and compiled code sees an operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import (
    CALL_SCHEMA,
    NO_SECOND_DERIVATIVE,
    Call,
    distinct,
    evaluate,
    flatten,
    loss_dtype,
    refuse_transforms,
    unflatten,
)

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # of all peers' logits at a time
NAME = "linear_mutual_loss"


def _denominators(call: Call, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the means divide the cross-entropy and the KL sums by: 0-d, on the device."""
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


def _new_grads(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Room for the gradients; float32 at least where chunks are added up."""
    rows = [torch.empty_like(t) if need else None for t, need in zip(hidden, needs, strict=False)]
    sums = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if need else None
        for t, need in zip((*weight, *bias), needs[len(hidden) :], strict=True)
    ]
    return rows + sums


def _compute(
    hidden: Sequence[Tensor],  # K tensors (N, D_k)
    weight: Sequence[Tensor],  # K tensors (C, D_k)
    bias: Sequence[Tensor | None],  # K tensors (C,), or None
    call: Call,
    chunk_rows: int | None,
    needs: Sequence[bool],  # which gradients are wanted, in the order of the arguments
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Losses (K,), the gradients of their sum times `unit`, and that number, 0-d. It is the rows
    that a mean divides by: float16 has nothing as small as their gradients."""
    K, (N, _), C = len(hidden), hidden[0].shape, weight[0].shape[0]
    dtype, device = loss_dtype(hidden), hidden[0].device
    unit = torch.ones((), dtype=dtype, device=device)
    if call.options.reduction == "mean":
        ce_count, kl_count = _denominators(call, N, dtype)
        unit = kl_count.clamp(min=1)
        call = call._replace(
            options=call.options.summed(),
            ce_weight=call.ce_weight * (unit / ce_count),
            kl_weight=call.kl_weight * (unit / kl_count),
        )
    if chunk_rows is None:
        row_bytes = sum(h.element_size() for h in hidden) * C
        chunk_rows = max(1, CHUNK_BYTES[device.type] // row_bytes)
    losses = torch.zeros(K, dtype=dtype, device=device)
    grads = _new_grads(hidden, weight, bias, needs)
    # the layers' dtypes are their own, within autocast too
    with torch.autocast(device.type, enabled=False):
        for start in range(0, max(N, 1), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = [
                torch.nn.functional.linear(h[rows], w, b)
                for h, w, b in zip(hidden, weight, bias, strict=True)
            ]
            part = call._replace(labels=call.labels[rows])
            sums, _, slopes = evaluate(logits, part, any(needs))
            losses += sums
            for k, slope in enumerate(slopes):
                of_hidden, of_weight, of_bias = grads[k], grads[K + k], grads[2 * K + k]
                if of_hidden is not None:
                    torch.mm(slope, weight[k], out=of_hidden[rows])
                if of_weight is not None:
                    of_weight += slope.t() @ hidden[k][rows]
                if of_bias is not None:
                    of_bias += slope.sum(0, dtype=of_bias.dtype)
    return losses / unit, unit, grads


class _EagerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, chunk_rows: int | None, needs: list[bool], *tensors):
        K = len(tensors) // 3
        losses, ctx.unit, ctx.grads = _compute(
            tensors[:K], tensors[K : 2 * K], tensors[2 * K :], call, chunk_rows, needs
        )
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
        refuse_transforms(NAME, (upstream,))
        if ctx.grads is None:
            raise RuntimeError(f"{NAME} keeps its gradients for one backward; call it again for "
                               "another")  # fmt: skip
        grads, ctx.grads = ctx.grads, None
        factors = (upstream / ctx.unit).split(1) * 3  # not 0-d: float16 would take them over
        return None, None, None, *(
            None if g is None else g.mul_(factor).to(dtype)
            for g, factor, dtype in zip(grads, factors, ctx.dtypes, strict=True)
        )  # fmt: skip


# ---- the operator that compiled code sees

torch.library.define(
    f"fastdml::{NAME}",
    "(Tensor[] hidden, Tensor[] weight, Tensor?[] bias, int? chunk_rows, bool[] needs, "
    f"{CALL_SCHEMA}) -> (Tensor, Tensor, Tensor[])",
)


def _compute_flat(hidden, weight, bias, chunk_rows, needs, *flat):
    losses, unit, grads = _compute(hidden, weight, bias, unflatten(*flat), chunk_rows, needs)
    return losses, unit, [g for g in grads if g is not None]


for _device in ("cpu", "cuda"):
    torch.library.impl(f"fastdml::{NAME}", _device, _compute_flat)


@torch.library.register_fake(f"fastdml::{NAME}")
def _fake(hidden, weight, bias, chunk_rows, needs, *flat):
    dtype, z = loss_dtype(hidden), hidden[0]
    grads = _new_grads(hidden, weight, bias, needs)
    kept = [g for g in grads if g is not None]
    return z.new_empty(len(hidden), dtype=dtype), z.new_empty((), dtype=dtype), kept


class _CompiledLinear(torch.autograd.Function):
    """As `_EagerLinear`, in the form that a tracer follows."""

    @staticmethod
    def forward(ctx, call: Call, chunk_rows: int | None, needs: list[bool], *tensors):
        K = len(tensors) // 3
        losses, unit, grads = torch.ops.fastdml.linear_mutual_loss(
            tensors[:K], tensors[K : 2 * K], tensors[2 * K :], chunk_rows, needs, *flatten(call)
        )
        ctx.needs = needs
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(unit, *grads)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        unit, *grads = ctx.saved_tensors
        factors = (upstream / unit).split(1) * 3
        rest = iter(grads)
        return None, None, None, *(
            (next(rest) * factor).to(dtype) if need else None
            for need, factor, dtype in zip(ctx.needs, factors, ctx.dtypes, strict=True)
        )  # fmt: skip


def linear_mutual_loss(
    hidden: Sequence[Tensor],  # K tensors (N, D_k)
    weight: Sequence[Tensor],  # K tensors (C, D_k)
    bias: Sequence[Tensor | None],  # K tensors (C,), or None
    call: Call,
    chunk_rows: int | None = None,
) -> Tensor:
    """Losses (K,), differentiable in hidden, weight and bias. Arguments are taken as checked."""
    tensors = (*hidden, *weight, *bias)
    enabled = torch.is_grad_enabled()
    needs = [enabled and t is not None and t.requires_grad for t in tensors]
    if torch.compiler.is_compiling():
        return _CompiledLinear.apply(call, chunk_rows, needs, *distinct(tensors))
    refuse_transforms(NAME, [t for t in tensors if t is not None])
    return _EagerLinear.apply(call, chunk_rows, needs, *tensors)
