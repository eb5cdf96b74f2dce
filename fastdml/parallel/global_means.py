"""Means over a batch that is computed in parts: of one process one after the other, and of a mesh
in the columns of its data axis. Gradients, losses and statistics add up to the whole batch's, also
where some rows have no label.

Means over the parts would weigh a row more where other rows of its part have no label, and be 0 / 0
where none has one. So the loss of every part is a sum over its rows, and the loss's weights are
divided by the number of labelled rows of the whole batch. That number needs the labels alone: the
columns add theirs by one reduction of three numbers, which begins before the forward passes and is
waited for behind them, by the device where it is one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats
from fastdml.parallel.gather import Rows

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh


class HasLosses(Protocol):
    """Of a step's output what means are taken of."""

    @property
    def losses(self) -> Tensor: ...
    @property
    def stats(self) -> MutualStats: ...


class Output(HasLosses, Protocol):
    """The output of a step (`fastdml.engine.StepOutput`)."""

    @property
    def metric(self) -> Tensor | None: ...
    @property
    def teacher_kl(self) -> Tensor | None: ...


AnyOutput = TypeVar("AnyOutput", bound=Output)


class GlobalMeans:
    """`loss` for each of `parts` parts of equal size of labels (N,): this process's share of a
    batch, or without a mesh the whole of it. The columns' shares may differ in size.

    Counts stay on the labels' device; the host never waits for them. Where all labels of a part
    have a class weight of 0, losses and gradients include their label smoothing, and `stats.ce`
    does not.
    """

    def __init__(
        self, loss: MutualLoss, labels: Tensor, mesh: Mesh | None = None, parts: int = 1
    ) -> None:
        options, weight = loss.options, loss.class_weight
        dtype = torch.float64 if labels.device.type == "cpu" else torch.float32
        labelled = labels != options.ignore_index
        ce = labelled.to(dtype)
        if weight is not None:
            classes = labels.long().clamp(0, len(weight) - 1)  # the loss refuses other labels
            ce = ce * weight.to(dtype)[classes]
        kl = torch.ones_like(ce) if options.mimic_ignored else labelled.to(dtype)
        self.given, self.options = loss, options
        self.ce, self.kl = (rows.view(parts, -1).sum(1) for rows in (ce, kl))  # (parts,)
        # Of the whole batch, once the reduction has ended.
        self.counts = torch.stack([self.ce.sum(), self.kl.sum(), labelled.sum(dtype=dtype)])
        self.work: Any = None
        if mesh is not None and mesh.data > 1:
            self.work = dist.all_reduce(self.counts, group=mesh.data_group, async_op=True)
        self._loss: MutualLoss | None = None

    @property
    def loss(self) -> MutualLoss:
        """That of each part. The first reading waits for the reduction of the counts; on NCCL the
        device does, and the host goes on."""
        if self._loss is None:
            if self.work is not None:
                self.work.wait()
            self._loss = copy.copy(self.given)
            if self.options.reduction == "mean":
                ce, kl, _ = self.counts
                self._loss.options = self.options.summed()
                self._loss.ce_weight = _divided(self.given.ce_weight, ce)
                self._loss.kl_weight = _divided(self.given.kl_weight, kl)
        return self._loss

    def whole(self, outputs: Sequence[HasLosses]) -> tuple[Tensor, MutualStats]:
        """Losses and statistics of all parts, from those of each. On a mesh they are this column's
        share: summed over the columns they are the whole batch's, and not finite where those are
        not. With reduction="none" the losses (K, N) are of the share's rows."""
        ce_count, kl_count, labelled = self.counts
        at = outputs[0].stats.layout
        parts = torch.stack([o.stats.packed for o in outputs], dim=-1)  # (at.size, parts)
        packed = parts.sum(-1)  # right for counts of rows; means over rows are replaced below
        means = _mean(parts, self.kl, kl_count)
        for name in ("kl", "entropy", "pairwise_kl"):
            packed[at.span(name)] = means[at.span(name)]
        ce = _mean(parts[at.span("ce")], self.ce, ce_count)
        if self.options.mimic_ignored:  # without any label the mean is 0 / 0, and counts as 0
            ce = ce.masked_fill(labelled == 0, 0.0)
        packed[at.span("ce")] = ce
        stats = MutualStats.from_packed(packed, outputs[0].stats.K)
        if self.options.reduction == "none":
            return torch.cat([o.losses for o in outputs], 1), stats
        losses = torch.stack([o.losses for o in outputs]).sum(0)
        if self.options.reduction == "mean":
            losses = torch.where(ce.isnan(), ce, losses)  # NaN where no row has a label
        return losses, stats


def total(output: AnyOutput, mesh: Mesh) -> AnyOutput:
    """The figures of the whole batch and of all peers on every rank, from the share that a step on
    a mesh gives each: a collective of all ranks. With the loss's reduction "none" the losses (K, N)
    are of the whole batch's rows, in its order."""
    losses, packed, K = output.losses, output.stats.packed, output.stats.K
    own = torch.zeros(K, dtype=torch.bool, device=packed.device)
    own[list(mesh.local)] = True
    no_peers = torch.full_like(own[0], mesh.row == 0)  # what is the same in all rows, from one
    mine = output.stats.layout.pack(
        {
            "ce": own, "kl": own, "label_weight": no_peers, "labelled": no_peers, "entropy": own,
            "correct": own, "ensemble_correct": no_peers, "pairwise_kl": own.expand(K, K),
        }
    )  # fmt: skip
    if losses.dim() == 2:
        losses = _among_all_rows(losses, mesh)
    figures = [(losses, own if losses.dim() == 1 else own[:, None]), (packed, mine)]
    figures += [(t, own) for t in (output.metric, output.teacher_kl) if t is not None]
    flat = torch.cat([t.masked_fill(~mask, 0.0).flatten() for t, mask in figures])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t, _ in figures])
    whole = [part.view_as(t).to(t.dtype) for part, (t, _) in zip(parts, figures, strict=True)]
    losses, packed, *others = whole
    named: Any = output  # a named tuple
    return named._replace(
        losses=losses,
        stats=MutualStats.from_packed(packed, K),
        metric=None if output.metric is None else others[0],
        teacher_kl=None if output.teacher_kl is None else others[-1],
    )


def _among_all_rows(losses: Tensor, mesh: Mesh) -> Tensor:
    """This column's (K, rows) at its place among the whole batch's (K, N), the others' 0."""
    sizes = Rows(losses.shape[1], mesh).sizes
    whole = losses.new_zeros(len(losses), sum(sizes))
    start = sum(sizes[: mesh.column])
    whole[:, start : start + sizes[mesh.column]] = losses
    return whole


def check_loss(loss: object) -> None:
    """Raises InputError for a loss whose means over a batch are not known to be sums of rows."""
    if isinstance(loss, MutualLoss) and type(loss).value_and_grad is MutualLoss.value_and_grad:
        return
    raise InputError(
        f"a mesh adds up losses of fastdml.MutualLoss alone, and this is a {type(loss).__name__}, "
        "whose mean over a batch in parts is not known: use MutualLoss, or train without a mesh"
    )


def _divided(weight: Tensor | float, count: Tensor) -> Tensor:
    """`weight / count`, and 0 where the count is 0, so that no rows give no gradient."""
    return (weight / count).masked_fill(count == 0, 0.0)


def _mean(values: Tensor, counts: Tensor, count: Tensor) -> Tensor:
    """The parts' contribution to the mean over `count` rows of the whole batch, from their means
    (..., parts), which are NaN where `counts` (parts,) is 0."""
    sums = (values * counts).masked_fill(counts == 0, 0.0).sum(-1)
    return (sums / count).to(values.dtype)
