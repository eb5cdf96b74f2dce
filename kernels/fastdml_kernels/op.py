"""`mutual_loss`: one call from logits to losses and gradients, for eager code and torch.compile.

The forward computes losses and gradients together; the backward hands the gradients over, scaled
in place where the losses' own gradient is not 1. Eager calls go straight to the launcher; compiled
code sees the operator `fastdml::mutual_loss`, whose autograd formula is traced around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .cpu import mutual_loss_cpu
from .launch import launch
from .options import Options, Scalar, stats_size
from .scale import scale_

NO_SECOND_DERIVATIVE = (
    "mutual_loss has no second derivative (create_graph=True, torch.func.grad): its gradient comes "
    "out of the forward kernel; use fastdml_kernels.reference for one"
)


class Call(NamedTuple):
    """Everything of a call but the logits."""

    labels: Tensor  # (N,) int32 or int64
    options: Options
    temperature: Scalar
    ce_weight: Scalar
    kl_weight: Scalar
    peer_weights: Tensor | None  # (K, K)
    class_weight: Tensor | None  # (C,)
    want_stats: bool


def refuse_transforms(name: str, tensors: Sequence[Tensor]) -> None:
    """Eager calls compute outside of what function transforms and forward mode see."""
    batched = map(torch._C._functorch.is_legacy_batchedtensor, tensors)  # by is_grads_batched
    if torch._C._are_functorch_transforms_active() or any(batched):
        raise RuntimeError(
            f"{name} does not run under torch.func transforms (grad, vmap, is_grads_batched, ...): "
            "use autograd, and a batch of problems as a longer batch of rows with reduction='none'"
        )
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(f"{name} has no forward-mode derivative: use backward()")


def gradients_now(logits: Sequence[Tensor], call: Call) -> bool:
    """Whether the forward can have the gradients ready. It cannot where they go into the teachers,
    for they then mix the K losses' own gradients; nor in float16, where a loss scale must come
    before the rounding, which loses whatever is below 3e-8: a GradScaler is there for these."""
    return call.options.detach_targets and all(z.dtype != torch.float16 for z in logits)


def peers_of(logits: Sequence[Tensor]) -> list[Tensor]:
    """K tensors (N, C) of K such tensors, or of one stacked (K, N, C): views, no copy."""
    return list(logits[0].unbind()) if logits[0].dim() == 3 else list(logits)


def evaluate(
    logits: Sequence[Tensor],  # K tensors (N, C), or one (K, N, C)
    call: Call,
    need_grad: bool,
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Losses (K,) or (K, N), packed statistics (None if not wanted), and gradients shaped as
    `logits` ([] if not needed). No autograd."""
    grads = [z.new_empty(z.shape) for z in logits] if need_grad else []
    compute = mutual_loss_cpu if logits[0].device.type == "cpu" else launch
    peer_weights, class_weight = (  # kernels know no strides of theirs
        None if w is None else w.contiguous() for w in (call.peer_weights, call.class_weight)
    )
    losses, stats = compute(
        peers_of(logits), call.labels, call.options,
        temperature=call.temperature, ce_weight=call.ce_weight, kl_weight=call.kl_weight,
        peer_weights=peer_weights, class_weight=class_weight,
        grads=peers_of(grads) if grads else (), want_stats=call.want_stats, upstream=upstream,
    )  # fmt: skip
    return losses, stats if call.want_stats else None, grads


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *logits: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.now = gradients_now(logits, call)
        losses, stats, ctx.grads = evaluate(logits, call, ctx.now)
        ctx.call = call
        ctx.save_for_backward(*logits)  # for a second backward; checked for changes only then
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return losses, stats

    @staticmethod
    def backward(ctx, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_transforms("mutual_loss", (upstream,))
        call = ctx.call._replace(want_stats=False)
        if ctx.now:
            # The stored gradients are given away, as the next node may write into them; a second
            # backward through a retained graph computes them again.
            grads, ctx.grads = ctx.grads, None
            if grads is None:
                grads = evaluate(ctx.saved_tensors, call, True)[2]
            scale_(peers_of(grads), upstream)
        else:
            grads = evaluate(ctx.saved_tensors, call, True, upstream)[2]
        wanted = ctx.needs_input_grad[1:]
        return None, *(g if w else None for g, w in zip(grads, wanted, strict=True))


# ---- the operator that compiled code sees

# A `Call` as an operator's arguments.
CALL_SCHEMA = (
    "Tensor labels, Tensor? peer_weights, Tensor? class_weight, "
    "Tensor? temperature_tensor, Tensor? ce_weight_tensor, Tensor? kl_weight_tensor, "
    "float temperature, float ce_weight, float kl_weight, "
    "str target, str gate, bool symmetric, bool detach_targets, float label_smoothing, "
    "SymInt ignore_index, bool mimic_ignored, str reduction, bool want_stats"
)


def flatten(call: Call) -> tuple:
    scalars = (call.temperature, call.ce_weight, call.kl_weight)
    tensors = [s if isinstance(s, Tensor) else None for s in scalars]
    numbers = [1.0 if isinstance(s, Tensor) else float(s) for s in scalars]
    o = call.options
    return (
        call.labels, call.peer_weights, call.class_weight, *tensors, *numbers,
        o.target, o.gate, o.symmetric, o.detach_targets, o.label_smoothing, o.ignore_index,
        o.mimic_ignored, o.reduction, call.want_stats,
    )  # fmt: skip


def unflatten(labels, peer_weights, class_weight, *rest) -> Call:
    tensors, numbers, options, want_stats = rest[:3], rest[3:6], rest[6:-1], rest[-1]
    scalars = (n if t is None else t for t, n in zip(tensors, numbers, strict=True))
    return Call(labels, Options(*options), *scalars, peer_weights, class_weight, want_stats)


torch.library.define(
    "fastdml::mutual_loss",
    f"(Tensor[] logits, Tensor? upstream, bool need_grad, {CALL_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor[])",
)


def _evaluate_flat(logits, upstream, need_grad, *flat):
    losses, stats, grads = evaluate(logits, unflatten(*flat), need_grad, upstream)
    if stats is None:  # an operator's results have fixed types
        K = logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
        stats = losses.new_zeros(stats_size(K))
    return losses, stats, grads


for _device in ("cpu", "cuda"):
    torch.library.impl("fastdml::mutual_loss", _device, _evaluate_flat)


@torch.library.register_fake("fastdml::mutual_loss")
def _fake(logits, upstream, need_grad, *flat):
    reduction = unflatten(*flat).options.reduction
    K = logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
    N = logits[0].shape[-2]
    z = logits[0]
    dtype = loss_dtype(logits)
    losses = z.new_empty((K, N) if reduction == "none" else (K,), dtype=dtype)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in logits if need_grad]
    return losses, z.new_empty(stats_size(K), dtype=dtype), grads


def loss_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float32, and float64 where any peer's logits are."""
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


class _CompiledLoss(torch.autograd.Function):
    """As `_EagerLoss`, in the form that a tracer follows: the compiler fuses the scaling away."""

    @staticmethod
    def forward(ctx, call: Call, *logits: Tensor) -> tuple[Tensor, Tensor]:
        ctx.now = gradients_now(logits, call)
        losses, stats, grads = torch.ops.fastdml.mutual_loss(logits, None, ctx.now, *flatten(call))
        ctx.call = call._replace(want_stats=False)
        ctx.save_for_backward(*(grads if ctx.now else logits))
        ctx.mark_non_differentiable(stats)
        return losses, stats

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not ctx.now:
            flat = flatten(ctx.call)
            return None, *torch.ops.fastdml.mutual_loss(saved, upstream, True, *flat)[2]
        if saved[0].dim() == 3:
            shape = (*upstream.shape, *(1,) * (3 - upstream.dim()))
            return None, (saved[0] * upstream.view(shape)).to(saved[0].dtype)
        scaled = []
        for grad, g in zip(saved, upstream.unbind(), strict=True):
            g = g if g.dim() == 0 else g[:, None]
            scaled.append((grad * g).to(grad.dtype))
        return None, *scaled


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """dynamo takes no tensor twice: one that is two peers' goes in as a view as well."""
    return [
        t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]


def mutual_loss(logits: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """Losses and packed statistics (None if not wanted), differentiable in the logits: K tensors
    (N, C) or one (K, N, C). Arguments are taken as checked."""
    needs_grad = torch.is_grad_enabled() and any(z.requires_grad for z in logits)
    if torch.compiler.is_compiling():
        if needs_grad:
            return _CompiledLoss.apply(call, *distinct(logits))
        return torch.ops.fastdml.mutual_loss(logits, None, False, *flatten(call))[:2]
    refuse_transforms("mutual_loss", logits)
    if needs_grad:
        return _EagerLoss.apply(call, *logits)
    return evaluate(logits, call, False)[:2]
