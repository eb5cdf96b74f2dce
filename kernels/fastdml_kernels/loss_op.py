"""`mutual_loss`: one call from logits to losses and gradients, for eager code and torch.compile.

The forward computes losses and gradients together; the backward hands the gradients over, scaled
in place where the losses' upstream gradient is not 1. Eager calls of plain tensors go straight to
the launcher. Tracers, dispatch modes, and tensors that are not plain memory get the operator
`fastdml::mutual_loss`, which has a fake implementation and its own autograd formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .counters import prepare
from .cpu import mutual_loss_cpu
from .launch import launch
from .options import Options, Scalar
from .scale_grads import scale_
from .stats_layout import stats_layout
from .torch_private import (
    dispatch_mode_active,
    function_transforms_active,
    has_tangents,
    is_plain,
    ordinary,
    transforms_active,
)

AS_IT_IS = nullcontext()
NO_SECOND_DERIVATIVE = (
    "mutual_loss has no second derivative (create_graph=True, torch.func.grad): its gradient comes "
    "out of the forward kernel; use fastdml_kernels.reference for one"
)


class Call(NamedTuple):
    """The arguments of a call of the loss, except the logits."""

    labels: Tensor  # (N,) int32 or int64
    options: Options
    temperature: Scalar
    ce_weight: Scalar
    kl_weight: Scalar
    peer_weights: Tensor | None  # (K, K)
    class_weight: Tensor | None  # (C,)
    want_stats: bool

    def tensors(self) -> list[Tensor]:
        # isinstance(v, Tensor) is slow for what is none, and every call of the loss comes by here.
        return [
            self.labels,
            *[
                v
                for v in self[2:7]
                if v is not None and type(v) is not float and isinstance(v, Tensor)
            ],
        ]


def refuse_transforms(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError under torch.func's transforms and in forward mode: an eager call reads
    the tensors' memory directly, where neither can follow it."""
    if function_transforms_active(tensors):
        raise RuntimeError(
            f"{name} does not run under torch.func transforms (grad, vmap, is_grads_batched, ...): "
            "use autograd, and a batch of problems as a longer batch of rows with reduction='none'"
        )
    if has_tangents(tensors):
        raise RuntimeError(f"{name} has no forward-mode derivative: use backward()")


def gradients_now(logits: Sequence[Tensor], call: Call) -> bool:
    """Whether the forward can compute the gradients, for the backward to scale.

    Not where they flow into the teachers: each peer's gradient then is a sum over the K losses,
    weighted by the losses' own gradients, which only the backward knows. Nor in float16, which
    rounds what is below 3e-8 to 0: a GradScaler's loss scale, which the backward brings, must
    multiply before that."""
    return call.options.detach_targets and torch.float16 not in [z.dtype for z in logits]


def peers_of(logits: Sequence[Tensor]) -> list[Tensor]:
    """K tensors (N, C) of K such tensors, or of one stacked (K, N, C): views, no copy."""
    return list(logits[0].unbind()) if logits[0].dim() == 3 else list(logits)


def at_once(tensors: Iterable[Tensor]) -> bool:
    """Whether a call is the usual one: eager, of plain tensors, with nothing on that looks at
    operations or changes what a derivative is. Said in one pass; what is not usual is told apart by
    `refuse_transforms`, `by_operator` and `keepable`."""
    return not (
        torch.compiler.is_compiling()
        or dispatch_mode_active()
        or torch.jit.is_tracing()
        or transforms_active()
    ) and ordinary(tensors)


def by_operator(tensors: Iterable[Tensor]) -> bool:
    """Whether a call must go through the dispatcher: to the compiler, a tracer, a dispatch mode
    (FakeTensorMode, make_fx, counters of FLOPs), or since a tensor is not plain memory."""
    return (
        torch.compiler.is_compiling()
        or dispatch_mode_active()
        or torch.jit.is_tracing()
        or not all(map(is_plain, tensors))
    )


def _without_autocast(device: str) -> AbstractContextManager:
    """The loss computes in float32 whatever surrounds it. (Kernels do anyway.)"""
    if device == "cpu" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return AS_IT_IS


def losses_and_grads(
    logits: Sequence[Tensor],  # K tensors (N, C), or one (K, N, C)
    call: Call,
    need_grad: bool,
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
    usual: bool = False,  # whether the call is known to be `at_once`
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Losses (K,) or (K, N), packed statistics (None if not wanted), and gradients shaped as
    `logits` ([] if not needed). No autograd."""
    if not usual and by_operator((*logits, *call.tensors())):
        with torch.no_grad():
            losses, stats, grads = torch.ops.fastdml.mutual_loss(
                logits, upstream, need_grad, *flatten(call)
            )
        return losses, stats if call.want_stats else None, grads
    grads = new_grads(logits) if need_grad else []
    if logits[0].device.type != "cpu":  # no operation of torch that autograd would see
        return *compute(logits, call, grads, upstream), grads
    with torch.no_grad():
        return *compute(logits, call, grads, upstream), grads


def new_grads(logits: Sequence[Tensor], of_float16: torch.dtype = torch.float16) -> list[Tensor]:
    """Empty tensors for the gradients, in the logits' shape and dtype, contiguous."""
    return [
        torch.empty_like(z)
        if z.is_contiguous() and z.dtype != torch.float16
        else torch.empty_like(
            z,
            dtype=of_float16 if z.dtype == torch.float16 else None,
            memory_format=torch.contiguous_format,
        )
        for z in logits
    ]


def compute(
    logits: Sequence[Tensor],  # K tensors (N, C), or one (K, N, C); plain ones
    call: Call,
    grads: Sequence[Tensor] = (),  # to be filled; () for none
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Losses (K,) or (K, N) and packed statistics (None if not wanted)."""
    device = logits[0].device.type
    of_device = mutual_loss_cpu if device == "cpu" else launch
    peer_weights, class_weight = call.peer_weights, call.class_weight
    if peer_weights is not None:  # the kernels assume contiguous weights
        peer_weights = peer_weights.contiguous()
    if class_weight is not None:
        class_weight = class_weight.contiguous()
    with _without_autocast(device):
        losses, stats = of_device(
            peers_of(logits), call.labels, call.options,
            temperature=call.temperature, ce_weight=call.ce_weight, kl_weight=call.kl_weight,
            peer_weights=peer_weights, class_weight=class_weight,
            grads=peers_of(grads) if grads else (), want_stats=call.want_stats, upstream=upstream,
        )  # fmt: skip
    return losses, stats if call.want_stats else None


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, saved: Sequence[Tensor], *logits: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`saved`: the logits and the tensors of the call."""
        ctx.now = gradients_now(logits, call)
        ctx.grads = new_grads(logits) if ctx.now else None
        losses, stats = compute(logits, call, ctx.grads or ())
        ctx.call = call
        # Unpacked only by a backward that computes gradients (not `ctx.now`, or a second one), as
        # unpacking raises where one of them has been changed in place since.
        ctx.save_for_backward(*saved)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return losses, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_transforms("mutual_loss", (upstream,))
        wanted = ctx.needs_input_grad[2:]
        # The stored gradients are given away, as the next node may write into them; a second
        # backward through a retained graph computes them again.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            logits = ctx.saved_tensors[: len(wanted)]
            grads = new_grads(logits)
            call = ctx.call._replace(want_stats=False)
            compute(logits, call, grads, None if ctx.now else upstream)
        if ctx.now:
            scale_(peers_of(grads), upstream)
        return None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True))


# ---- the operator that compiled code sees

# A `Call` as an operator's arguments.
CALL_SCHEMA = (
    "Tensor labels, Tensor? peer_weights, Tensor? class_weight, "
    "Tensor? temperature_tensor, Tensor? ce_weight_tensor, Tensor? kl_weight_tensor, "
    "float temperature, float ce_weight, float kl_weight, "
    "str target, str gate, bool symmetric, bool detach_targets, float label_smoothing, "
    "SymInt ignore_index, bool mimic_ignored, str reduction, bool want_stats"
)


def flatten(call: Call) -> tuple[Any, ...]:
    """A `Call` as the arguments of `CALL_SCHEMA`."""
    scalars = (call.temperature, call.ce_weight, call.kl_weight)
    tensors = [s if isinstance(s, Tensor) else None for s in scalars]
    numbers = [1.0 if isinstance(s, Tensor) else float(s) for s in scalars]
    o = call.options
    return (
        call.labels, call.peer_weights, call.class_weight, *tensors, *numbers,
        o.target, o.gate, o.symmetric, o.detach_targets, o.label_smoothing, o.ignore_index,
        o.mimic_ignored, o.reduction, call.want_stats,
    )  # fmt: skip


def unflatten(
    labels: Tensor, peer_weights: Tensor | None, class_weight: Tensor | None, *rest: Any
) -> Call:
    """The `Call` from the arguments that `flatten` made."""
    tensors, numbers, options, want_stats = rest[:3], rest[3:6], rest[6:-1], rest[-1]
    T, ce, kl = (n if t is None else t for t, n in zip(tensors, numbers, strict=True))
    return Call(labels, Options(*options), T, ce, kl, peer_weights, class_weight, want_stats)


torch.library.define(
    "fastdml::mutual_loss",
    f"(Tensor[] logits, Tensor? upstream, bool need_grad, {CALL_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor[])",
)


def _losses_and_grads_flat(
    logits: Sequence[Tensor], upstream: Tensor | None, need_grad: bool, *flat: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grads = new_grads(logits) if need_grad else []
    losses, stats = compute(logits, unflatten(*flat), grads, upstream)
    if stats is None:  # an operator's results have fixed types
        K = logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
        stats = losses.new_zeros(stats_layout(K).size)
    elif stats.untyped_storage().data_ptr() == losses.untyped_storage().data_ptr():
        stats = stats.clone()  # nor may they share memory, which a compiler would not know
    return losses, stats, grads


for _device in ("cpu", "cuda"):
    torch.library.impl("fastdml::mutual_loss", _device, _losses_and_grads_flat)


@torch.library.register_fake("fastdml::mutual_loss")
def _fake(
    logits: Sequence[Tensor], upstream: Tensor | None, need_grad: bool, *flat: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    prepare(logits[0].device)
    reduction = unflatten(*flat).options.reduction
    K = logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
    N = logits[0].shape[-2]
    z = logits[0]
    dtype = loss_dtype(logits)
    losses = z.new_empty((K, N) if reduction == "none" else (K,), dtype=dtype)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in logits if need_grad]
    # int: makes a compiler treat the number of peers as a constant, not as a symbol
    return losses, z.new_empty(stats_layout(int(K)).size, dtype=dtype), grads


def loss_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float32, and float64 where any peer's logits are."""
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, _, need_grad, *flat = inputs
    _, stats, grads = output
    ctx.mark_non_differentiable(stats)
    ctx.inputs, ctx.K, ctx.now = len(inputs), len(logits), need_grad
    if ctx.now:
        ctx.save_for_backward(*grads)
    else:
        ctx.call = unflatten(*flat)._replace(want_stats=False)
        ctx.save_for_backward(*logits, *ctx.call.tensors())


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    saved = ctx.saved_tensors
    if ctx.now:
        grads = scaled(saved, upstream)
    else:
        flat = flatten(ctx.call)
        grads = torch.ops.fastdml.mutual_loss(saved[: ctx.K], upstream, True, *flat)[2]
    return grads, *(None,) * (ctx.inputs - 1)


torch.library.register_autograd("fastdml::mutual_loss", _backward, setup_context=_setup_context)


def scaled(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """As `scale_`, but in new tensors, for compiled graphs: the compiler fuses the multiplication
    with what follows."""
    if grads[0].dim() == 3:
        factors = [upstream.view(*upstream.shape, *(1,) * (3 - upstream.dim()))]
    else:
        factors = [g if g.dim() == 0 else g[:, None] for g in upstream.unbind()]
    return [(grad * g).to(grad.dtype) for grad, g in zip(grads, factors, strict=True)]


def keepable(logits: Sequence[Tensor], call: Call) -> tuple[Sequence[Tensor], Call]:
    """The same arguments, with tensors made under inference_mode copied: autograd cannot save
    those, since it could not notice a change in place."""
    if any(t.is_inference() for t in (*logits, *call.tensors())):
        copy = lambda v: v.clone() if isinstance(v, Tensor) and v.is_inference() else v  # noqa: E731
        return list(map(copy, logits)), Call._make(map(copy, call))
    return logits, call


def mutual_loss(
    logits: Sequence[Tensor], call: Call, usual: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Losses and packed statistics (None if not wanted), differentiable in the logits: K tensors
    (N, C) or one (K, N, C). Arguments are taken as checked. usual: whether the call is known to be
    `at_once`.

    Raises RuntimeError under torch.func's transforms and in forward mode, and ValueError on the
    CPU for a label that is no class."""
    needs_grad = torch.is_grad_enabled() and any([z.requires_grad for z in logits])  # noqa: C419
    tensors = [*logits, *call.tensors()]
    if not usual:
        if not torch.compiler.is_compiling():
            refuse_transforms("mutual_loss", logits)
            if needs_grad:
                logits, call = keepable(logits, call)
                tensors = [*logits, *call.tensors()]
        if by_operator(tensors):
            now = needs_grad and gradients_now(logits, call)
            losses, stats, _ = torch.ops.fastdml.mutual_loss(logits, None, now, *flatten(call))
            return losses, stats if call.want_stats else None
    if needs_grad:
        return _EagerLoss.apply(call, tensors, *logits)
    return compute(logits, call)
