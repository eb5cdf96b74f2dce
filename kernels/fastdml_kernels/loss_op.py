"""`mutual_loss`: one call from logits to losses and gradients, for eager code and torch.compile.

The forward computes losses and gradients together; the backward hands the gradients over, scaled
in place where the losses' upstream gradient is not 1. Eager calls of plain tensors go straight to
the launcher. Tracers, dispatch modes, and tensors that are not plain memory get the operator
`fastdml::mutual_loss`, which has a fake implementation and its own autograd formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

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
    ordinary_apply,
    watched,
)

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
    sample_weight: Tensor | None  # (N,), not negative
    want_stats: bool

    def tensors(self) -> list[Tensor]:
        # Every call of the loss comes by here, most with numbers and labels alone.
        labels, _, T, ce, kl, of_peers, of_classes, of_rows, _ = self
        if of_peers is of_classes is of_rows is None and type(T) is type(ce) is type(kl) is float:
            return [labels]
        return [labels, *[v for v in self[2:8] if isinstance(v, Tensor)]]


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


def is_stacked(logits: Sequence[Tensor]) -> bool:
    """Whether the logits are one tensor (K, N, C), not K of (N, C)."""
    return logits[0].dim() == 3


def count(logits: Sequence[Tensor]) -> int:
    """K."""
    return logits[0].shape[0] if is_stacked(logits) else len(logits)


def peers_of(logits: Sequence[Tensor]) -> list[Tensor]:
    """K tensors (N, C) of K such tensors, or of one stacked (K, N, C): views, no copy."""
    return list(logits[0].unbind()) if is_stacked(logits) else list(logits)


def students_of(logits: Sequence[Tensor], given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The peers, of those given (None is all), whose logits require a gradient."""
    if len(logits) == 1 and is_stacked(logits):
        if not logits[0].requires_grad:
            return ()
        return tuple(range(logits[0].shape[0])) if given is None else given
    if given is None:
        return tuple([k for k, z in enumerate(logits) if z.requires_grad])
    return tuple([k for k in given if logits[k].requires_grad])


def teachers_detached(logits: Sequence[Tensor], students: Sequence[int]) -> Sequence[Tensor]:
    """The logits, those of other peers than the students without their graphs, which a backward
    would otherwise pass, call the hooks of, and free. A stacked tensor has one graph, and stays."""
    if is_stacked(logits):
        return logits
    return [z if k in students else z.detach() for k, z in enumerate(logits)]


def at_once(tensors: Iterable[Tensor]) -> bool:
    """Whether a call is the usual one: eager, of plain tensors, with nothing on that looks at
    operations or changes what a derivative is. Said in one pass; what is not usual is told apart by
    `refuse_transforms`, `by_operator` and `keepable`."""
    return not (torch.compiler.is_compiling() or watched()) and ordinary(tensors)


def by_operator(tensors: Iterable[Tensor]) -> bool:
    """Whether a call must go through the dispatcher: to the compiler, a tracer, a dispatch mode
    (FakeTensorMode, make_fx, counters of FLOPs), or since a tensor is not plain memory."""
    return (
        torch.compiler.is_compiling()
        or dispatch_mode_active()
        or torch.jit.is_tracing()
        or not all(map(is_plain, tensors))
    )


def losses_and_grads(
    logits: Sequence[Tensor],  # K tensors (N, C), or one (K, N, C)
    call: Call,
    students: Sequence[int],  # peers whose gradients are wanted, ascending
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
    usual: bool = False,  # whether the call is known to be `at_once`
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Losses (K,) or (K, N), packed statistics (None if not wanted), and gradients shaped as
    `logits`, None for a peer that only teaches, or 0 in its rows of a stacked one ([] without
    students). No autograd."""
    if not usual and by_operator((*logits, *call.tensors())):
        with torch.no_grad():
            losses, stats, found = torch.ops.fastdml.mutual_loss(
                logits, upstream, students, True, *flatten(call)
            )
        grads = _of_each(logits, students, found) if students else []
        return losses, stats if call.want_stats else None, grads
    grads = new_grads(logits, students)
    of_peers = grads_of_peers(grads, students)
    if logits[0].device.type != "cpu":  # no operation of torch that autograd would see
        return *compute(logits, call, of_peers, upstream), grads
    with torch.no_grad():
        return *compute(logits, call, of_peers, upstream), grads


def new_grads(
    logits: Sequence[Tensor], students: Sequence[int], of_float16: torch.dtype = torch.float16
) -> list[Tensor | None]:
    """Tensors for the students' gradients, in the logits' shape and dtype, contiguous: None for a
    peer that only teaches; of stacked logits one tensor, teachers' rows 0; [] without students. All
    else is not written yet."""
    if not students:
        return []
    learning: Sequence[Tensor | None] = logits
    if len(students) < len(logits):
        learning = [z if k in students else None for k, z in enumerate(logits)]
    grads = [
        None
        if z is None
        else torch.empty_like(z)
        if z.is_contiguous() and z.dtype != torch.float16
        else torch.empty_like(
            z,
            dtype=of_float16 if z.dtype == torch.float16 else None,
            memory_format=torch.contiguous_format,
        )
        for z in learning
    ]
    if len(logits) == 1 and is_stacked(logits):
        _zero_teachers(cast(Tensor, grads[0]), students)
    return grads


def _zero_teachers(stacked: Tensor, students: Sequence[int]) -> None:
    if len(students) < stacked.shape[0]:
        with torch.no_grad():
            for k, rows in enumerate(stacked.unbind()):
                if k not in students:
                    rows.zero_()


def grads_of_peers(
    grads: Sequence[Tensor | None], students: Sequence[int]
) -> Sequence[Tensor | None]:
    """What `new_grads` made as the kernels take it: (N, C) each, None for a peer that only teaches;
    () without students."""
    if len(grads) != 1 or grads[0] is None or grads[0].dim() == 2:
        return grads
    each = grads[0].unbind()
    if len(students) == len(each):
        return each
    return [g if k in students else None for k, g in enumerate(each)]


def _of_each(
    logits: Sequence[Tensor], students: Sequence[int], found: Sequence[Tensor]
) -> list[Tensor | None]:
    """What the operator found, shaped as `new_grads` does: None for a peer that only teaches."""
    if is_stacked(logits):
        return list(found)
    each = iter(found)
    return [next(each) if k in students else None for k in range(len(logits))]


def compute(
    logits: Sequence[Tensor],  # K tensors (N, C), or one (K, N, C); plain ones
    call: Call,
    grads: Sequence[
        Tensor | None
    ] = (),  # (N, C) each, to be filled; None for a teacher; () for none
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Losses (K,) or (K, N) and packed statistics (None if not wanted)."""
    of_device: Callable[..., tuple[Tensor, Tensor | None]] = launch
    if logits[0].is_cpu:
        of_device = mutual_loss_cpu
        if torch.is_autocast_enabled("cpu"):  # float32 whatever surrounds it, as in the kernels
            with torch.autocast("cpu", enabled=False):
                return compute(logits, call, grads, upstream)
    peer_weights, class_weight, sample_weight = call[5:8]
    if peer_weights is not None:  # the kernels assume contiguous weights
        peer_weights = peer_weights.contiguous()
    if class_weight is not None:
        class_weight = class_weight.contiguous()
    if sample_weight is not None:
        sample_weight = sample_weight.contiguous()
    losses, stats = of_device(
        peers_of(logits), call.labels, call.options,
        temperature=call.temperature, ce_weight=call.ce_weight, kl_weight=call.kl_weight,
        peer_weights=peer_weights, class_weight=class_weight, sample_weight=sample_weight,
        grads=grads, want_stats=call.want_stats, upstream=upstream,
    )  # fmt: skip
    return losses, stats if call.want_stats else None


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, students: Sequence[int], saved: Sequence[Tensor], *logits: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`saved`: the logits and the tensors of the call."""
        ctx.now = gradients_now(logits, call)
        ctx.grads = new_grads(logits, students) if ctx.now else None
        losses, stats = compute(logits, call, grads_of_peers(ctx.grads or (), students))
        ctx.call, ctx.students = call, students
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
        if watched() or not ordinary((upstream,)):
            refuse_transforms("mutual_loss", (upstream,))
        # The stored gradients are given away, as the next node may write into them; a second
        # backward through a retained graph computes them again.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            logits = ctx.saved_tensors[: len(ctx.needs_input_grad) - 3]
            grads = new_grads(logits, ctx.students)
            of_peers = grads_of_peers(grads, ctx.students)
            call = ctx.call._replace(want_stats=False)
            compute(logits, call, of_peers, None if ctx.now else upstream)
        if ctx.now:
            scale_(grads_of_peers(grads, ctx.students), upstream)
        return None, None, None, *grads


_apply = ordinary_apply(_EagerLoss)

# ---- the operator that compiled code sees

# A `Call` as an operator's arguments.
CALL_SCHEMA = (
    "Tensor labels, Tensor? peer_weights, Tensor? class_weight, Tensor? sample_weight, "
    "Tensor? temperature_tensor, Tensor? ce_weight_tensor, Tensor? kl_weight_tensor, "
    "float temperature, float ce_weight, float kl_weight, "
    "str target, str gate, str divergence, float jsd_beta, bool detach_targets, "
    "float label_smoothing, SymInt ignore_index, bool mimic_ignored, str reduction, "
    "bool want_stats"
)


def flatten(call: Call) -> tuple[Any, ...]:
    """A `Call` as the arguments of `CALL_SCHEMA`, which has no students: an operator is told beside
    it whose gradients to compute."""
    scalars = (call.temperature, call.ce_weight, call.kl_weight)
    tensors = [s if isinstance(s, Tensor) else None for s in scalars]
    numbers = [1.0 if isinstance(s, Tensor) else float(s) for s in scalars]
    o = call.options
    return (
        call.labels, *call[5:8], *tensors, *numbers,
        o.target, o.gate, o.divergence, o.jsd_beta, o.detach_targets, o.label_smoothing,
        o.ignore_index, o.mimic_ignored, o.reduction, call.want_stats,
    )  # fmt: skip


def unflatten(labels: Tensor, *rest: Any) -> Call:
    """The `Call` from the arguments that `flatten` made."""
    (edges, of_class, of_row), tensors, numbers = rest[:3], rest[3:6], rest[6:9]
    options, want_stats = rest[9:-1], rest[-1]
    T, ce, kl = (n if t is None else t for t, n in zip(tensors, numbers, strict=True))
    return Call(labels, Options(*options), T, ce, kl, edges, of_class, of_row, want_stats)


torch.library.define(
    "fastdml::mutual_loss",
    # students: peers in whose logits the losses are differentiable; now: whether their gradients
    # are computed here, one tensor each, or one for stacked logits
    f"(Tensor[] logits, Tensor? upstream, int[] students, bool now, {CALL_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor[])",
)


def _losses_and_grads_flat(
    logits: Sequence[Tensor],
    upstream: Tensor | None,
    students: Sequence[int],
    now: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grads = new_grads(logits, students) if now else []
    losses, stats = compute(logits, unflatten(*flat), grads_of_peers(grads, students), upstream)
    if stats is None:  # an operator's results have fixed types
        stats = losses.new_zeros(stats_layout(count(logits)).size)
    elif stats.untyped_storage().data_ptr() == losses.untyped_storage().data_ptr():
        stats = stats.clone()  # nor may they share memory, which a compiler would not know
    return losses, stats, [g for g in grads if g is not None]


for _device in ("cpu", "cuda"):
    torch.library.impl("fastdml::mutual_loss", _device, _losses_and_grads_flat)


@torch.library.register_fake("fastdml::mutual_loss")
def _fake(
    logits: Sequence[Tensor],
    upstream: Tensor | None,
    students: Sequence[int],
    now: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    prepare(logits[0].device)
    reduction = unflatten(*flat).options.reduction
    K, N, z = count(logits), logits[0].shape[-2], logits[0]
    dtype = loss_dtype(logits)
    losses = z.new_empty((K, N) if reduction == "none" else (K,), dtype=dtype)
    learning = logits if is_stacked(logits) else [logits[k] for k in students]
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in learning if now and students
    ]
    # int: makes a compiler treat the number of peers as a constant, not as a symbol
    return losses, z.new_empty(stats_layout(int(K)).size, dtype=dtype), grads


def loss_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float32, and float64 where any peer's logits are."""
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, _, ctx.students, ctx.now, *flat = inputs
    _, stats, grads = output
    ctx.mark_non_differentiable(stats)
    ctx.inputs, ctx.given, ctx.K = len(inputs), len(logits), count(logits)
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
        grads = scaled(saved, upstream, ctx.students)
    else:
        grads = torch.ops.fastdml.mutual_loss(
            saved[: ctx.given], upstream, ctx.students, True, *flatten(ctx.call)
        )[2]
    of_logits: list[Tensor | None] = list(grads)
    if ctx.given > 1 and ctx.given != len(grads):
        of_logits = [None] * ctx.given
        for k, grad in zip(ctx.students, grads, strict=True):
            of_logits[k] = grad
    return of_logits, *(None,) * (ctx.inputs - 1)


torch.library.register_autograd("fastdml::mutual_loss", _backward, setup_context=_setup_context)


def scaled(grads: Sequence[Tensor], upstream: Tensor, students: Sequence[int]) -> list[Tensor]:
    """As `scale_`, but in new tensors, for compiled graphs: the compiler fuses the multiplication
    with what follows. grads: of each student, or one for stacked logits."""
    each = upstream.unbind()
    if grads[0].dim() == 3:
        if len(students) < len(each):  # teachers' rows stay 0, whatever their losses' gradient is
            ones = torch.ones_like(each[0])
            upstream = torch.stack([g if k in students else ones for k, g in enumerate(each)])
        factors = [upstream.view(*upstream.shape, *(1,) * (3 - upstream.dim()))]
    else:
        factors = [each[k] if each[k].dim() == 0 else each[k][:, None] for k in students]
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
    enabled = torch.is_grad_enabled()
    students = students_of(logits, call.options.students) if enabled else ()
    looked_at = usual or torch.compiler.is_compiling()
    if not looked_at:
        refuse_transforms("mutual_loss", logits)
    if call.options.students is not None:
        logits = teachers_detached(logits, students)
    if students and not looked_at:
        logits, call = keepable(logits, call)
    tensors = [*logits, *call.tensors()]
    if not usual and by_operator(tensors):
        if not students:
            logits = [z.detach() for z in logits]
        now = bool(students) and gradients_now(logits, call)
        losses, stats, _ = torch.ops.fastdml.mutual_loss(
            logits, None, students, now, *flatten(call)
        )
        return losses, stats if call.want_stats else None
    if students:
        apply = _apply if usual else _EagerLoss.apply
        return apply(call, students, tensors, *logits)
    return compute(logits, call)
