"""`linear_mutual_loss`: the mutual loss of linear layers' outputs, its options checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

from fastdml_kernels import linear_mutual_loss as _linear_mutual_loss
from torch import Tensor
from typing_extensions import Unpack

from fastdml.linear_checks import check_given, check_layers
from fastdml.loss_checks import check_call
from fastdml.loss_options import LinearLossOptions, call_with, mask_length, shows

Matrices = Tensor | Sequence[Tensor]
Biases = Tensor | Sequence[Tensor | None] | None


class LinearRows(NamedTuple):
    """What `linear_mutual_loss` says of each row, at temperature 1: constants, in float32 (float64
    for float64 logits)."""

    log_prob: Tensor  # (K, N), log softmax(z_k) at the label; 0 for a row without one
    entropy: Tensor  # (K, N), of softmax(z_k), in nats


@overload
def linear_mutual_loss(
    hidden: Matrices,
    weight: Matrices,
    labels: Tensor,
    bias: Biases = ...,
    *,
    teacher_logits: Matrices | None = ...,
    teacher_topk: tuple[Tensor, Tensor] | None = ...,
    return_rows: Literal[False] = ...,
    chunk_rows: int | None = ...,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...


@overload
def linear_mutual_loss(
    hidden: Matrices,
    weight: Matrices,
    labels: Tensor,
    bias: Biases = ...,
    *,
    teacher_logits: Matrices | None = ...,
    teacher_topk: tuple[Tensor, Tensor] | None = ...,
    return_rows: Literal[True],
    chunk_rows: int | None = ...,
    **options: Unpack[LinearLossOptions],
) -> tuple[Tensor, LinearRows]: ...


@overload
def linear_mutual_loss(
    hidden: Matrices,
    weight: Matrices,
    labels: Tensor,
    bias: Biases = ...,
    *,
    teacher_logits: Matrices | None = ...,
    teacher_topk: tuple[Tensor, Tensor] | None = ...,
    return_rows: bool,
    chunk_rows: int | None = ...,
    **options: Unpack[LinearLossOptions],
) -> Tensor | tuple[Tensor, LinearRows]: ...


@shows(LinearLossOptions)
def linear_mutual_loss(
    hidden: Matrices,
    weight: Matrices,
    labels: Tensor,
    bias: Biases = None,
    *,
    teacher_logits: Matrices | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    return_rows: bool = False,
    chunk_rows: int | None = None,
    **options: Unpack[LinearLossOptions],
) -> Tensor | tuple[Tensor, LinearRows]:
    """`mutual_loss` of K linear layers' outputs, without ever holding (K, N, C) logits.

    Losses (K,) of logits z_k = hidden_k weight_k^T + bias_k, computed a chunk of rows at a time,
    with the gradients of hidden, weight and bias. For wide C, such as a language model's
    vocabulary, the logits are most of a training step's memory.

    hidden: K tensors (N, D_k), or one (K, N, D); their widths may differ between peers.
    weight: K tensors (C, D_k), or one (K, C, D). bias: K tensors (C,) or None each, or one (K, C).
    students: which of the K peers learn; by default those any of whose tensors requires a
        gradient. The others only teach: none of their tensors gets a gradient or work for one.
    teacher_logits: more teachers, beyond the K peers, whose logits are given: (N, C), (T, N, C) or
        T tensors (N, C), in any of the logits' dtypes; on the same device, or in the host's memory,
        a mapped file included, from where a chunk at a time is copied (without waiting, from pinned
        memory). They are constants. The losses are those of `mutual_loss` of the K logits followed
        by the T given, of which the last T have no entry in the result. `peer_weights` and the
        mean over the teachers are of all K + T: with K = 1 and one teacher this is distillation.
    teacher_topk: one more teacher, after those: (log_probs, indices), (N, k) each, floating and
        int64 or int32, of its k likeliest classes, all different; normalised over the k. Every
        other class has probability 0, so that divergence="reverse" and "jeffreys" are refused:
        they would be infinite. On CUDA a row with an index that is no class is NaN.
    return_rows: also return `LinearRows`: of each row the log-probability of its label and the
        entropy, from the logits in memory.
    chunk_rows: rows at a time; by default as many as 256 MB of logits hold (64 MB on the CPU).
    reduction: "mean" or "sum". The other options are those of `mutual_loss`; teachers are
        constants.

    One backward a forward: the gradients are ready when the loss is, and are given away (compiled
    code keeps them). Those of weight and bias are added up over the chunks in float32, with no
    other (C, D) beside them. Layers compute in their own dtypes, within autocast too. Raises
    ValueError and TypeError for arguments that do not fit, RuntimeError for a second backward or
    derivative and under torch.func.
    """
    if "detach_targets" in options:
        raise TypeError("detach_targets: linear_mutual_loss has constant teachers only")
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: linear_mutual_loss has 'mean' and 'sum'")
    hiddens, weights, biases = check_layers(hidden, weight, bias)
    if chunk_rows is not None and not (isinstance(chunk_rows, int) and chunk_rows >= 1):
        raise ValueError(f"chunk_rows={chunk_rows!r}: give a whole number, at least 1 row")
    call = call_with(labels, False, **options)
    N, C = len(hiddens[0]), len(weights[0])
    mask = mask_length(options.get("students"))
    # as logits to be checked: tensors of their shape with no memory to speak of
    logits = [h.new_empty(()).expand(len(h), C) for h in hiddens]
    given, dtypes = check_given(teacher_logits, teacher_topk, call, logits, mask)
    if dtypes:
        mask = None  # it is of the peers with layers alone, and has been looked at
        logits += [logits[0].new_empty((), dtype=dtype).expand(N, C) for dtype in dtypes]
    check_call(logits, call, mask)
    losses, log_prob, entropy = _linear_mutual_loss(
        hiddens, weights, biases, call, chunk_rows, given, bool(return_rows)
    )
    if log_prob is None or entropy is None:
        return losses
    return losses, LinearRows(log_prob, entropy)
