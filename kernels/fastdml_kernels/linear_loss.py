"""The last linear layers and the mutual loss together: (K, N, C) logits never exist.

Rows go through a chunk at a time: logits by matrix products, losses and their gradients
by the fused loss, gradients of hidden, weight and bias by matrix products; then the chunk's
memory is used again. All of it happens in the forward pass, so that the backward only scales. For a
language model's vocabulary the logits are most of the memory of a step (Hsu et al. 2024, Liger).

As in `loss_op`, eager calls of plain tensors compute at once and tracers see an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .counters import prepare
from .given_teachers import NO_TEACHERS, GivenTeachers
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
    refuse_transforms,
    unflatten,
)
from .options import Scalar
from .row_values import write_row_values

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
    each = None if call.sample_weight is None else call.sample_weight.to(dtype)
    counted = labelled if each is None else torch.where(labelled, each, 0.0)  # (N,)
    rows = counted.sum().to(dtype)
    weight = rows
    if call.class_weight is not None:
        C = call.class_weight.shape[0]
        known = labelled & (call.labels >= 0) & (call.labels < C)
        of_label = call.class_weight.to(dtype)[call.labels.clamp(0, C - 1)]
        if each is not None:
            known &= each != 0
            of_label = of_label * each
        weight = torch.where(known, of_label, 0.0).sum()
    if call.options.mimic_ignored:
        # a batch without any label teaches by the KL term alone
        weight = torch.where(rows == 0, torch.ones_like(weight), weight)
        rows = torch.full_like(rows, N) if each is None else each.sum()
    return weight, rows


def _averaged(call: Call, K: int, N: int, dtype: torch.dtype) -> tuple[Call, Tensor, Tensor]:
    """The same call as one whose sums over chunks, divided by the `unit`, are the means; the unit,
    0-d; and a number to add to the losses, (): NaN where nothing is counted, else 0.

    The unit is about the number of rows: the backward divides by it, since gradients of a mean
    underflow in float16."""
    ce_count, kl_count = _denominators(call, N, dtype)
    unit = kl_count if call.sample_weight is None else torch.full_like(kl_count, N)
    unit = unit.clamp(min=1)
    ce_weight, unknown = _per(ce_count, unit, call.ce_weight)
    kl_weight, kl_unknown = _per(kl_count, unit, call.kl_weight)
    if K > 1:
        unknown = unknown + kl_unknown
    options = call.options.summed()
    return call._replace(options=options, ce_weight=ce_weight, kl_weight=kl_weight), unit, unknown


class _Layers(NamedTuple):
    hidden: Sequence[Tensor]  # K tensors (N, D_k)
    weight: Sequence[Tensor]  # K tensors (C, D_k)
    bias: Sequence[Tensor | None]  # K tensors (C,), or None

    def write_logits(self, rows: slice, logits: Sequence[Tensor]) -> None:
        """The logits of some rows, into K tensors (n, C)."""
        for h, w, b, z in zip(*self, logits, strict=True):
            if b is None:
                torch.mm(h[rows], w.t(), out=z)
            else:
                torch.addmm(b, h[rows], w.t(), out=z)

    def add_grads(
        self, rows: slice, slopes: Sequence[Tensor | None], grads: Sequence[Tensor | None]
    ) -> None:
        """Gradients of hidden, weight and bias, from those of some rows' logits."""
        for k, slope in enumerate(slopes):
            of_hidden, of_weight, of_bias = grads[k :: len(slopes)]
            if slope is None:
                continue
            if of_hidden is not None:
                torch.mm(slope, self.weight[k], out=of_hidden[rows])
            if of_weight is not None:
                add_product(of_weight, slope, self.hidden[k][rows])
            if of_bias is not None:
                of_bias += slope.sum(0, dtype=of_bias.dtype)


class _Rest(NamedTuple):
    """The arguments beside the layers."""

    call: Call
    given: GivenTeachers
    chunk_rows: int | None
    needs: Sequence[int]  # which gradients are wanted: of hidden, weight and bias of each peer
    want_rows: bool


class _Computed(NamedTuple):
    losses: Tensor  # (K,)
    unit: Tensor  # ()
    log_prob: Tensor  # (K, N); (0,) where rows are not wanted
    entropy: Tensor  # (K, N); (0,) where rows are not wanted
    grads: list[Tensor | None]  # of the losses' sum times `unit`


def _compute(layers: _Layers, rest: _Rest) -> _Computed:
    call, given = rest.call, rest.given
    K, (N, _), C = len(layers.hidden), layers.hidden[0].shape, layers.weight[0].shape[0]
    dtype, device = loss_dtype([*layers.hidden, *given.logits]), layers.hidden[0].device
    given.check_indices(C)
    unit = torch.ones((), dtype=dtype, device=device)
    losses = torch.zeros(K, dtype=dtype, device=device)
    if call.options.reduction == "mean":
        call, unit, unknown = _averaged(call, K + given.number, N, dtype)
        losses += unknown
    chunk_rows = rest.chunk_rows
    if chunk_rows is None:
        row_bytes = sum(h.element_size() for h in layers.hidden) * C + given.row_bytes(C)
        chunk_rows = max(1, CHUNK_BYTES[device.type] // row_bytes)
    grads = new_layer_grads(*layers, rest.needs)
    by_row = losses.new_empty((2, K, N) if rest.want_rows else (2, 0))
    learns = [any(rest.needs[k::K]) for k in range(K)]
    step = min(chunk_rows, max(N, 1))
    # every chunk's logits, and their gradients, lie in the same memory
    logits = [h.new_empty(step, C) for h in layers.hidden]
    slopes = [torch.empty_like(z) if learns[k] else None for k, z in enumerate(logits)]
    # the layers compute in the dtypes of their tensors, under autocast too
    with torch.autocast(device.type, enabled=False):
        for start in range(0, max(N, 1), step):
            rows = slice(start, min(start + step, N))
            n = rows.stop - rows.start
            z = [t[:n] for t in logits]
            slope = [None if t is None else t[:n] for t in slopes]
            layers.write_logits(rows, z)
            teachers = given.chunk(rows, C, device, dtype, call.options.gate)
            to_fill = [*slope, *(None for _ in teachers)] if any(learns) else []
            sums, _ = compute([*z, *teachers], _part(call, rows), to_fill)
            losses += sums[:K]
            layers.add_grads(rows, slope, grads)
            if rest.want_rows:
                labels = call.labels[rows]
                write_row_values(z, labels, call.options.ignore_index, *by_row[:, :, rows])
    return _Computed(losses / unit, unit, by_row[0], by_row[1], grads)


def _part(call: Call, rows: slice) -> Call:
    """The call of some rows."""
    weight = call.sample_weight
    return call._replace(
        labels=call.labels[rows], sample_weight=None if weight is None else weight[rows]
    )


class _EagerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: _Rest, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`tensors`: hidden, weight and bias of the K peers, a bias None where there is none.
        Losses, and the log-probabilities and entropies of rows."""
        K = len(tensors) // 3
        layers = _Layers(tensors[:K], tensors[K : 2 * K], tensors[2 * K :])
        losses, ctx.unit, log_prob, entropy, ctx.grads = _compute(layers, rest)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.mark_non_differentiable(log_prob, entropy)
        return losses, log_prob, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
        refuse_transforms(NAME, (upstream,))
        if ctx.grads is None:
            raise RuntimeError(f"{NAME} keeps its gradients for one backward; call it again for "
                               "another")  # fmt: skip
        grads, ctx.grads = ctx.grads, None
        factors = (upstream / ctx.unit).split(1) * 3  # (1,): a 0-d one would become float16
        return None, *(
            None if g is None else g.mul_(factor).to(dtype)
            for g, factor, dtype in zip(grads, factors, ctx.dtypes, strict=True)
        )


# ---- the operator that compiled code sees

# The given teachers of an operator, as those of a `Call` in `CALL_SCHEMA`.
_GIVEN_SCHEMA = "Tensor[] teacher_logits, Tensor? teacher_log_probs, Tensor? teacher_indices"
torch.library.define(
    f"fastdml::{NAME}",
    # biased and needs are bools as ints: torch.jit.trace does not support lists of bools
    f"(Tensor[] hidden, Tensor[] weight, Tensor[] bias, int[] biased, {_GIVEN_SCHEMA}, "
    f"int? chunk_rows, int[] needs, bool want_rows, {CALL_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
)


def _arguments(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    *rest: Any,
) -> tuple[_Layers, _Rest]:
    """What `_compute` takes, from the operator's arguments."""
    # the list has the biases that exist: an operator that autograd differentiates takes no list of
    # optional tensors
    present = iter(bias)
    layers = _Layers(hidden, weight, [next(present) if has else None for has in biased])
    given, (chunk_rows, needs, want_rows, *flat) = GivenTeachers(*rest[:3]), rest[3:]
    return layers, _Rest(unflatten(*flat), given, chunk_rows, needs, want_rows)


def _compute_flat(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    losses, unit, log_prob, entropy, grads = _compute(*_arguments(*arguments))
    # an operator's results may not share memory
    return losses, unit, log_prob.clone(), entropy.clone(), [g for g in grads if g is not None]


for _device in ("cpu", "cuda"):
    torch.library.impl(f"fastdml::{NAME}", _device, _compute_flat)


@torch.library.register_fake(f"fastdml::{NAME}")
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    layers, rest = _arguments(*arguments)
    z = layers.hidden[0]
    dtype = loss_dtype([*layers.hidden, *rest.given.logits])
    prepare(z.device)
    K, N = len(layers.hidden), z.shape[0]  # len(z) would make N a constant
    losses = z.new_empty(K, dtype=dtype)
    log_prob, entropy = (losses.new_empty((K, N) if rest.want_rows else (0,)) for _ in range(2))
    kept = [g for g in new_layer_grads(*layers, rest.needs) if g is not None]
    return losses, losses.new_empty(()), log_prob, entropy, kept


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, ctx.biased, teacher_logits, *_ = inputs
    _, unit, log_prob, entropy, grads = output
    ctx.mark_non_differentiable(unit, log_prob, entropy)
    ctx.inputs, ctx.needs, ctx.teachers = len(inputs), inputs[8], len(teacher_logits)
    ctx.dtypes = [t.dtype for t in (*hidden, *weight, *bias)]
    ctx.save_for_backward(unit, *grads)


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE.replace("mutual_loss", NAME))
    unit, *grads = ctx.saved_tensors
    K, factors = len(ctx.biased), (upstream / unit).split(1) * 3
    rest, dtypes, exists = iter(grads), iter(ctx.dtypes), [True] * 2 * K + list(ctx.biased)
    out = []
    for has, need, factor in zip(exists, ctx.needs, factors, strict=True):
        if has:
            dtype = next(dtypes)
            out.append((next(rest) * factor).to(dtype) if need else None)
    of_layers = out[:K], out[K : 2 * K], out[2 * K :]
    return *of_layers, None, [None] * ctx.teachers, *(None,) * (ctx.inputs - 5)


torch.library.register_autograd(f"fastdml::{NAME}", _backward, setup_context=_setup_context)


def linear_mutual_loss(
    hidden: Sequence[Tensor],  # K tensors (N, D_k)
    weight: Sequence[Tensor],  # K tensors (C, D_k)
    bias: Sequence[Tensor | None],  # K tensors (C,), or None
    call: Call,
    chunk_rows: int | None = None,
    given: GivenTeachers = NO_TEACHERS,
    want_rows: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (K,), differentiable in hidden, weight and bias of the students; and of each row the
    log-probability of its label and its entropy, (K, N), None unless wanted. Arguments are taken as
    checked. `call` is of the peers with layers and then the `given` teachers.

    chunk_rows: rows whose logits exist at a time, by `CHUNK_BYTES` unless given. Raises
    RuntimeError under torch.func's transforms, in forward mode and in a second backward, and
    ValueError on the CPU for a label, or a class of a top-k teacher, that is no class."""
    K, students = len(hidden), call.options.students
    tensors: tuple[Any, ...] = (*hidden, *weight, *bias)
    present = [*(t for t in tensors if t is not None), *given.tensors()]
    if not torch.compiler.is_compiling():
        refuse_transforms(NAME, present)
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        and (students is None or i % K in students)
        for i, t in enumerate(tensors)
    ]  # fmt: skip
    if students is not None:  # the others' graphs are left out
        tensors = tuple(
            t if t is None or need else t.detach() for t, need in zip(tensors, needs, strict=True)
        )
        hidden, weight, bias = tensors[:K], tensors[K : 2 * K], tensors[2 * K :]
    if by_operator((*present, *call.tensors())):
        biases, biased = [b for b in bias if b is not None], [int(b is not None) for b in bias]
        losses, _, *by_row, _ = torch.ops.fastdml.linear_mutual_loss(
            hidden, weight, biases, biased, *given, chunk_rows, list(map(int, needs)), want_rows,
            *flatten(call),
        )  # fmt: skip
    else:
        rest = _Rest(call, given, chunk_rows, needs, want_rows)
        losses, *by_row = _EagerLinear.apply(rest, *tensors)
    return losses, *(by_row if want_rows else (None, None))
