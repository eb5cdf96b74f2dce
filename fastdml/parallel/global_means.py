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
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh


class HasLosses(Protocol):
    """Of a step's output what means are taken of."""

    @property
    def losses(self) -> Tensor: ...
    @property
    def stats(self) -> MutualStats: ...


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


def check_loss(loss: object) -> None:
    """Raises InputError for a loss whose means over a batch are not known to be sums of rows."""
    own = type(loss)
    if not isinstance(loss, MutualLoss) or own.value_and_grad is not MutualLoss.value_and_grad:
        raise InputError(
            f"a mesh adds up losses of fastdml.MutualLoss alone, and this one is {own.__name__}, "
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
