"""Gradient accumulation: a batch in parts whose gradients add up to the whole batch's, also where
some rows have no label.

Means over the parts would weigh a row more where other rows of its part have no label, and be 0 / 0
where none has one. So the loss of every part is a sum over its rows, and the loss's weights are
divided by the number of labelled rows of the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats

if TYPE_CHECKING:
    from fastdml.engine.execution import StepOutput


class Split:
    """`loss` for each of `parts` parts of equal size of a batch with these `labels` (N,).

    Counts stay on the labels' device; the host never waits for them. Where all labels of a part
    have a class weight of 0, losses and gradients include their label smoothing, and `stats.ce`
    does not.
    """

    def __init__(self, loss: MutualLoss, labels: Tensor, parts: int) -> None:
        options, weight = loss.options, loss.class_weight
        dtype = torch.float64 if labels.device.type == "cpu" else torch.float32
        labelled = labels != options.ignore_index
        ce = labelled.to(dtype)
        if weight is not None:
            classes = labels.long().clamp(0, len(weight) - 1)  # the loss refuses other labels
            ce = ce * weight.to(dtype)[classes]
        kl = torch.ones_like(ce) if options.mimic_ignored else labelled.to(dtype)
        self.options = options
        self.ce, self.kl = (rows.view(parts, -1).sum(1) for rows in (ce, kl))  # (parts,)
        # Without any label the mean cross-entropy is 0 / 0.
        self.without_ce = options.mimic_ignored & ~labelled.any()
        self.loss = copy.copy(loss)
        if options.reduction == "mean":
            self.loss.options = options.summed()
            self.loss.ce_weight = _divided(loss.ce_weight, self.ce.sum())
            self.loss.kl_weight = _divided(loss.kl_weight, self.kl.sum())

    def whole(self, outputs: Sequence[StepOutput]) -> tuple[Tensor, MutualStats]:
        """The whole batch's losses and statistics, computed from those of its parts."""
        at = outputs[0].stats.layout
        parts = torch.stack([o.stats.packed for o in outputs], dim=-1)  # (at.size, parts)
        packed = parts.sum(-1)  # right for counts of rows; means over rows are replaced below
        means = _mean(parts, self.kl)
        for name in ("kl", "entropy", "pairwise_kl"):
            packed[at.span(name)] = means[at.span(name)]
        ce = _mean(parts[at.span("ce")], self.ce).masked_fill(self.without_ce, 0.0)
        packed[at.span("ce")] = ce
        stats = MutualStats.from_packed(packed, outputs[0].stats.K)
        if self.options.reduction == "none":
            return torch.cat([o.losses for o in outputs], 1), stats
        losses = torch.stack([o.losses for o in outputs]).sum(0)
        if self.options.reduction == "mean":
            losses = torch.where(ce.isnan(), ce, losses)  # NaN where no row has a label
        return losses, stats


def _divided(weight: Tensor | float, count: Tensor) -> Tensor:
    """`weight / count`, and 0 where the count is 0, so that no rows give no gradient."""
    return (weight / count).masked_fill(count == 0, 0.0)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """The whole batch's mean of the parts' (..., parts), which are NaN where `counts` is 0."""
    sums = (values * counts).masked_fill(counts == 0, 0.0).sum(-1)
    return (sums / counts.sum()).to(values.dtype)
