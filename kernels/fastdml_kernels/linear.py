"""The last linear layers and the mutual loss together: (K, N, C) logits never exist.

Rows go through a chunk at a time: logits by matrix products, losses and their gradients
by the fused loss, gradients of hidden, weight and bias by matrix products; then the chunk's
memory is used again. All of it happens in the forward pass, so that the backward only scales. For a
language model's vocabulary the logits are most of the memory of a step (Hsu et al. 2024, Liger).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import NO_SECOND_DERIVATIVE, Call, evaluate

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # of all peers' logits at a time


def _denominators(call: Call, N: int) -> tuple[Tensor, Tensor]:
    """What the means divide the cross-entropy and the KL sums by: 0-d, on the device."""
    labelled = call.labels != call.options.ignore_index
    rows = labelled.sum().float()
    weight = rows
    if call.class_weight is not None:
        C = call.class_weight.shape[0]
        known = labelled & (call.labels >= 0) & (call.labels < C)
        weight = torch.where(known, call.class_weight[call.labels.clamp(0, C - 1)], 0.0).sum()
    if call.options.mimic_ignored:
        # a batch without any label teaches by the KL term alone
        return torch.where(rows == 0, torch.ones_like(weight), weight), torch.full_like(rows, N)
    return weight, rows


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, K: int, chunk_rows: int | None, *tensors: Tensor | None):
        hidden, weight, bias = tensors[:K], tensors[K : 2 * K], tensors[2 * K :]
        N, C = hidden[0].shape[0], weight[0].shape[0]
        needs = ctx.needs_input_grad[3:]
        if call.options.reduction == "mean":
            ce_count, kl_count = _denominators(call, N)
            call = call._replace(
                options=call.options.summed(),
                ce_weight=call.ce_weight / ce_count,
                kl_weight=call.kl_weight / kl_count,
            )
        if chunk_rows is None:
            row_bytes = sum(h.element_size() for h in hidden) * C
            chunk_rows = max(1, CHUNK_BYTES[hidden[0].device.type] // row_bytes)
        losses = hidden[0].new_zeros(K, dtype=torch.float32)
        ctx.grads = [
            None if not need or t is None else torch.zeros_like(t, dtype=torch.float32)
            if i >= K else torch.empty_like(t)
            for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
        ]  # fmt: skip
        for start in range(0, N, chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = [
                torch.nn.functional.linear(h[rows], w, b)
                for h, w, b in zip(hidden, weight, bias, strict=True)
            ]
            part = call._replace(labels=call.labels[rows])
            sums, _, slopes = evaluate(logits, part, any(needs))
            losses += sums
            for k, slope in enumerate(slopes):
                of_hidden, of_weight, of_bias = ctx.grads[k], ctx.grads[K + k], ctx.grads[2 * K + k]
                if of_hidden is not None:
                    torch.mm(slope, weight[k].to(slope.dtype), out=of_hidden[rows])
                if of_weight is not None:
                    of_weight += slope.t() @ hidden[k][rows]
                if of_bias is not None:
                    of_bias += slope.sum(0, dtype=torch.float32)
        ctx.K = K
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", "linear_mutual_loss"))
        if ctx.grads is None:
            raise RuntimeError(
                "linear_mutual_loss keeps its gradients for one backward; call it again for another"
            )
        grads, ctx.grads = ctx.grads, None
        scaled = []
        for i, grad in enumerate(grads):
            if grad is not None:
                grad = grad.mul_(upstream[i % ctx.K]).to(ctx.dtypes[i])
            scaled.append(grad)
        return None, None, None, *scaled


def linear_mutual_loss(
    hidden: Sequence[Tensor],  # K tensors (N, D_k)
    weight: Sequence[Tensor],  # K tensors (C, D_k)
    bias: Sequence[Tensor | None],  # K tensors (C,), or None
    call: Call,
    chunk_rows: int | None = None,
) -> Tensor:
    """Losses (K,), differentiable in hidden, weight and bias. Arguments are taken as checked."""
    return _LinearLoss.apply(call, len(hidden), chunk_rows, *hidden, *weight, *bias)
