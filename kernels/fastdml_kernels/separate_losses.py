"""The losses of K peers with an autograd node each: `losses[k].backward()` reaches only peer k.

One launch computes all of them and their gradients. Peer k's node holds peer k's gradient, scales
it, and hands it to peer k's logits; the other peers' graphs are not touched, nor freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .loss_op import (
    NO_SECOND_DERIVATIVE,
    Call,
    by_operator,
    compute,
    flatten,
    keepable,
    new_grads,
    refuse_transforms,
    students_of,
)
from .scale_grads import scale_

NAME = "mutual_losses"


def _ones(logits: Sequence[Tensor], call: Call) -> Tensor | None:
    """The upstream gradient to launch with: ones for float16 logits, whose gradients `mutual_loss`
    computes in its backward by the kernel that takes an upstream gradient. With ones that kernel
    runs here too and gives the same bits. None for other dtypes, as in `mutual_loss`'s forward."""
    if all(z.dtype != torch.float16 for z in logits):
        return None
    K, N = len(logits), logits[0].shape[0]
    shape = (K, N) if call.options.reduction == "none" else (K,)
    return logits[0].new_ones(shape, dtype=torch.float32)


def _with_gradients(
    logits: Sequence[Tensor], call: Call, students: Sequence[int]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Losses, statistics and the students' gradients. Those of float16 logits stay in float32,
    because the backward multiplies them by a loss scale before they may be rounded."""
    grads = new_grads(logits, students, of_float16=torch.float32)
    return *compute(logits, call, grads, _ones(logits, call)), grads


class _OwnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int, loss: Tensor, grad: Tensor, fixed: Sequence[Tensor],
                call: Call, students: Sequence[int]) -> Tensor:  # fmt: skip
        ctx.k, ctx.grad, ctx.call, ctx.dtype, ctx.students = k, grad, call, z.dtype, students
        ctx.save_for_backward(*fixed, *call.tensors())  # for a second backward
        return loss.data  # no view: `loss += penalty` is allowed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
        refuse_transforms(NAME, (upstream,))
        grad, ctx.grad = ctx.grad, None  # given away: the next node may write into it
        if grad is None:
            fixed = ctx.saved_tensors[: len(ctx.saved_tensors) - len(ctx.call.tensors())]
            call = ctx.call._replace(want_stats=False)  # for all: the same work gives the same bits
            grad = _with_gradients(fixed, call, ctx.students)[2][ctx.k]
        if grad.dtype == ctx.dtype:
            scale_([grad], upstream[None])
        else:
            factor = upstream if upstream.dim() == 0 else upstream[:, None]
            grad = torch.mul(grad, factor, out=torch.empty_like(grad, dtype=ctx.dtype))
        return grad, *(None,) * 6


# ---- for tracers: the losses and gradients of `fastdml::mutual_loss`, joined to the logits

torch.library.define("fastdml::own_loss", "(Tensor logits, Tensor loss, Tensor grad) -> Tensor")


@torch.library.impl("fastdml::own_loss", "CompositeExplicitAutograd")
def _own_loss(logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
    return loss.clone()


@torch.library.register_fake("fastdml::own_loss")
def _fake(logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(loss)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    logits, _, grad = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(grad)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
    factor = upstream if upstream.dim() == 0 else upstream[:, None]
    return (ctx.saved_tensors[0] * factor).to(ctx.dtype), None, None


torch.library.register_autograd("fastdml::own_loss", _backward, setup_context=_setup_context)


def _traced(
    logits: Sequence[Tensor], call: Call, students: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    with torch.no_grad():
        fixed = [z.detach().float() if z.dtype == torch.float16 else z.detach() for z in logits]
        ones = _ones(logits, call) if students else None
        losses, stats, grads = torch.ops.fastdml.mutual_loss(
            fixed, ones, students, bool(students), *flatten(call)
        )
        each = losses.unbind()
    of_student = dict(zip(students, grads, strict=True))
    return tuple(
        torch.ops.fastdml.own_loss(logits[k], loss, of_student[k])
        if k in of_student
        else loss.clone()
        for k, loss in enumerate(each)
    ), stats


def mutual_losses(
    logits: Sequence[Tensor],  # K tensors (N, C)
    call: Call,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """K losses, 0-d or (N,), each differentiable in its own logits, and packed statistics (None if
    not wanted). Arguments are taken as checked.

    Raises RuntimeError under torch.func's transforms and in forward mode, and ValueError on the
    CPU for a label that is no class."""
    given = call.options.students
    students = students_of(logits, given) if torch.is_grad_enabled() else ()
    if not torch.compiler.is_compiling():
        refuse_transforms(NAME, logits)
    if by_operator((*logits, *call.tensors())):
        apart, packed = _traced(logits, call, students)
        return apart, packed if call.want_stats else None
    if not students:
        losses, stats = compute(logits, call)
        return tuple(loss.data for loss in losses.unbind()), stats
    kept, call = keepable(logits, call)
    fixed = [z.detach() for z in kept]
    losses, stats, grads = _with_gradients(fixed, call, students)
    each = enumerate(zip(logits, losses.unbind(), grads, strict=True))
    return tuple(
        loss.data if grad is None else _OwnLoss.apply(z, k, loss, grad, fixed, call, students)
        for k, (z, loss, grad) in each
    ), stats
