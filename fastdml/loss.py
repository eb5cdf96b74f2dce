"""`mutual_loss`: the Deep Mutual Learning loss of K peers, its options checked.

One kernel launch on CUDA, or one call into native code on the CPU, computes every peer's
cross-entropy, the KL divergences between the peers, the statistics and the gradients; see
`fastdml_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, overload

import torch
from fastdml_kernels import Call, losses_and_grads, students_of
from fastdml_kernels import mutual_loss as _mutual_loss
from fastdml_kernels import mutual_losses as _mutual_losses
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdml.loss_checks import check_call
from fastdml.loss_options import LossOptions, call_with, mask_length, shows
from fastdml.mutual_stats import MutualStats


def _count(tensors: list[Tensor]) -> int:
    return tensors[0].shape[0] if tensors[0].dim() == 3 else len(tensors)


def _losses(tensors: list[Tensor], usual: bool, call: Call) -> Tensor | tuple[Tensor, MutualStats]:
    losses, packed = _mutual_loss(tensors, call, usual)
    return losses if packed is None else (losses, MutualStats.from_packed(packed, _count(tensors)))


class MutualLoss(nn.Module):
    """`mutual_loss` with its options kept: `MutualLoss(temperature=2.0)(logits, labels)`.

    ce_weight, kl_weight and temperature are attributes that a schedule may assign or, as 0-d
    tensors, fill in place. `peer_weights` and `class_weight` are buffers and move with the module;
    sample_weight belongs to a batch and is given with it.
    """

    peer_weights: Tensor | None
    class_weight: Tensor | None

    @shows(LossOptions)
    def __init__(self, *, return_stats: bool = False, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        given = call_with(torch.empty(0), return_stats, **options)
        self.options = given.options
        self._mask_length = mask_length(options.get("students"))
        self.temperature = given.temperature
        self.ce_weight = given.ce_weight
        self.kl_weight = given.kl_weight
        self.register_buffer("peer_weights", given.peer_weights, persistent=False)
        self.register_buffer("class_weight", given.class_weight, persistent=False)
        self.return_stats = given.want_stats
        if given.sample_weight is not None:
            raise ValueError("sample_weight belongs to a batch: give it when the loss is called")

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MutualStats]:
        """As `mutual_loss(logits, labels, sample_weight=...)` with this module's options."""
        return _losses(*self._call(logits, labels, sample_weight, self.return_stats))

    def value_and_grad(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, MutualStats, list[Tensor | None]]:
        """Losses, statistics, and the gradient of `losses.sum()` with respect to the logits, in
        their shape and dtype: K tensors (N, C), or one (K, N, C) for stacked logits.

        None for a peer that is no student, zeros in its rows of stacked logits. Students are those
        of the option, whether or not their logits require a gradient; without it, the peers whose
        logits require one, or all where none does.

        For `torch.autograd.backward(logits, gradients)`: no loss graph, no backward launch. With a
        loss scale give float16 logits as float32: here they are rounded before anyone scales them.
        """
        tensors, usual, call = self._call(logits, labels, sample_weight, True)
        students = call.options.students or students_of(tensors, None) or range(_count(tensors))
        losses, packed, grads = losses_and_grads(tensors, call, students, usual=usual)
        return losses, MutualStats.from_packed(cast(Tensor, packed), _count(tensors)), grads

    def _call(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        sample_weight: Tensor | None,
        want_stats: bool,
    ) -> tuple[list[Tensor], bool, Call]:
        weights = self._buffers  # as attributes they take as long as a kernel's launch
        call = Call(
            labels, self.options, self.temperature, self.ce_weight, self.kl_weight,
            weights["peer_weights"], weights["class_weight"], sample_weight, want_stats,
        )  # fmt: skip
        return *check_call(logits, call, self._mask_length), call

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, kl_weight={self.kl_weight}, {self.options}"


@overload
def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, MutualStats]: ...


@overload
def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, MutualStats]: ...


@shows(LossOptions)
def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, MutualStats]:
    """The Deep Mutual Learning loss of each of K peers (Zhang et al., CVPR 2018, section 3).

    L_k = ce_weight CE(y, p_k) + kl_weight T**2 sum_l w_kl KL(p_l || p_k), w_kl = 1 / (K - 1),
    with p_k = softmax(z_k / T) inside the KL. `loss.sum().backward()` trains all peers; with
    constant teachers the k-th loss touches the k-th logits only. K = 1 is plain cross-entropy, and
    K = 2 with one student plain distillation. For a loop with a backward and an optimizer per peer
    there is `mutual_losses`.

    logits: (K, N, C), or a sequence of K tensors (N, C), which is not copied; float32, bfloat16,
        float16, or float64 on the CPU; any strides; dtypes may differ between peers. Sums are in
        float32 (float64 for float64 logits), gradients in each peer's dtype, rounded once: those of
        float16 after a GradScaler's scale, in the backward, which then reads the logits again.
    labels: (N,) int64 or int32. On the CPU a label that is no class raises ValueError. On CUDA,
        where the host never waits for a value, its row's losses and gradients are NaN.
    temperature: T, for the KL term only, which is multiplied by T**2 (Hinton et al. 2015).
    ce_weight, kl_weight, temperature: numbers, the weights not below 0, where the loss would have
        no lower bound; or 0-d tensors on the logits' device, whose values are not looked at, and
        which a schedule can change inside a captured graph, and without compiling anew.
    target: what a peer learns from. "peers": each other peer, KL(p_l || p_k). "ensemble": the
        probability mean of the others, the paper's DML_e: the same gradient as "peers", since
        cross-entropy is linear in its target (on the CPU bit for bit), and a smaller value.
        "ensemble_logits": the softmax of the mean of the others' logits (Chen et al. 2020, OKDDip's
        baseline).
    peer_weights: (K, K), not negative; row k says how much peer k learns from each peer, 0 is no
        edge, the diagonal is not used. A mixed teacher is the weighted mean, times the row's sum.
    gate: "none". "correct": a teacher counts only on rows that it classifies right (Minami et al.
        2020). "best": on each row only the peer of lowest cross-entropy teaches, with weight 1
        (or its peer weight). Rows without a label have no such teacher. Softer ones share a peer's
        weights among its teachers anew on each row, the sum unchanged: "confidence" in proportion
        to the probability that a teacher gives the label (none on rows without one), "entropy" in
        proportion to exp(-H(p_l)), which needs no label; both at T = 1, times the peer weights. A
        teacher that is NaN counts for nothing. Gates are constants to the gradient.
    divergence: from a teacher t to a student q = p_k. "forward": KL(t || q), the paper's.
        "reverse": KL(q || t). "jeffreys": their mean. "jsd": b KL(t || m) + (1 - b) KL(q || m), the
        mixture m = b t + (1 - b) q, b = jsd_beta: the generalised Jensen-Shannon divergence of GKD
        (Agarwal et al. 2024, arXiv 2306.13649), in TRL and Liger; finite where supports differ. Of
        jsd_beta 0 it is "forward", of 1 "reverse". All times T**2.
    symmetric: True is another name for divergence="jeffreys".
    students: the peers that learn, as indices (one or more) or as a mask, K bools; by default those
        whose logits require a gradient. The others only teach: the losses are constants in their
        logits, no gradient is computed or kept for them, rows of stacked logits get 0. Their losses
        are reported like any.
    detach_targets: False lets gradients flow into the teachers as well, if they are students.
    label_smoothing, class_weight (C,), ignore_index: as in `torch.nn.functional.cross_entropy`.
    sample_weight: (N,) floating, not negative: a row of weight w counts as w rows, in means, sums,
        statistics and their counts; reduction="none" multiplies by it. A row of weight 0 is absent:
        what it holds, NaN too, has no effect. On the CPU a weight below 0, infinite or NaN raises
        ValueError.
    mimic_ignored: True keeps rows without a label in the KL term (semi-supervised, section 3.4);
        a batch without any label then has a cross-entropy of 0 instead of NaN.
    reduction: "mean" over rows (the CE's weighted as in cross_entropy; the KL's as in
        `kl_div(reduction="batchmean")`) or "sum", both (K,); "none", (K, N).
    return_stats: also return `MutualStats`, from the same pass. Its pairwise_kl is the forward
        divergence whatever `divergence` is.

    Raises ValueError and TypeError for shapes, dtypes, devices and values that do not fit;
    RuntimeError for a second derivative and under torch.func transforms.
    """
    call = call_with(labels, return_stats, **options)
    return _losses(*check_call(logits, call, mask_length(options.get("students"))), call)


@overload
def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, ...]: ...


@overload
def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[tuple[Tensor, ...], MutualStats]: ...


@overload
def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], MutualStats]: ...


@shows(LossOptions)
def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], MutualStats]:
    """`mutual_loss` as a tuple of K losses, for a loop with a backward and an optimizer per peer:

        losses = mutual_losses([peer(images) for peer in peers], labels)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()  # peer k's graph alone: no retain_graph, no gradient for another peer
            optimizer.step()

    One launch computes all losses and gradients, the same bits as `mutual_loss(...).sum()` and its
    backward. `losses[k]` has an autograd node of its own, which goes to `logits[k]` only, so that
    the others' gradients stay None. All are of the predictions given here: a peer that has stepped
    is not run again (Algorithm 1 of the paper runs it: `fastdml.engine.make_step` with
    update="sequential"). A GradScaler per peer works too. What torch.compile makes of a region has
    one backward: compile the peers and call this outside, or sum the losses inside.

    logits: K tensors (N, C). One stacked tensor is refused: through it every peer's backward would
        run into the others'. Gradients of float16 logits are kept in float32 until the backward.
    reduction: "mean" or "sum", K losses of no dimension; "none", K of (N,).
    students: the losses of the others are plain values, without a graph.
    detach_targets: False is refused: a teacher's gradient is a sum over its students' losses.
    Everything else is as in `mutual_loss`.
    """
    if isinstance(logits, Tensor):
        raise ValueError(
            f"logits as one tensor {tuple(logits.shape)}: mutual_losses takes a list of K tensors "
            "(N, C), whose graphs are apart; of one tensor use mutual_loss(...).sum().backward()"
        )
    if not options.get("detach_targets", True):
        raise ValueError(
            "detach_targets=False: gradients into the teachers mix the peers' losses, which "
            "mutual_losses keeps apart; use mutual_loss(...).sum().backward()"
        )
    call = call_with(labels, return_stats, **options)
    tensors, _ = check_call(logits, call, mask_length(options.get("students")))
    losses, packed = _mutual_losses(tensors, call)
    return losses if packed is None else (losses, MutualStats.from_packed(packed, len(tensors)))
