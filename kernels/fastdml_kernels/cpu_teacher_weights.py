"""How much each peer learns from each on each row, in torch: the edges, times what a gate finds."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import SOFT_GATES, Options


def right(scores: Tensor, row: Tensor, y: Tensor) -> Tensor:
    """Which rows have their largest score at the label. `row` holds a number of each row that is
    NaN where a score is: such a row counts as wrong."""
    return (scores.argmax(-1) == y) & ~row.isnan()


def teacher_weights(
    options: Options,
    edges: Tensor,  # (K student, K teacher)
    y: Tensor,  # (n,)
    labelled: Tensor | None,  # (n,) bool; None: every row has a label
    log_p: Tensor,  # (K, n, C), at T = 1; may be that at another T unless the gate is "entropy"
    nll: Tensor,  # (K, n) -log p of the label, at T = 1
) -> Tensor:
    """(K student, K teacher, n)"""
    K, n = nll.shape
    rows = edges[:, :, None].expand(K, K, n)
    gate = options.gate
    if gate == "none":
        return rows
    if gate in SOFT_GATES:
        worth = -nll if gate == "confidence" else -_entropy(log_p)
        if labelled is not None and gate == "confidence":
            worth = torch.where(labelled, worth, -torch.inf)
        return _softly(rows, worth)
    if gate == "correct":  # temperature does not move the maximum
        teaches = right(log_p, nll, y)
    else:
        best = torch.where(nll.isnan(), torch.inf, nll).argmin(0)
        teaches = (best == torch.arange(K, device=nll.device)[:, None]) & ~nll.isnan()
    if labelled is not None:
        teaches = teaches & labelled
    return rows * teaches


def _entropy(log_p: Tensor) -> Tensor:
    """(K, n) of (K, n, C)"""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, -p * log_p).sum(2)


def _softly(edges: Tensor, log_worth: Tensor) -> Tensor:
    """Edges (K, K, n) times the teachers' worth, exp(log_worth) (K, n), so that each student's add
    up to what its edges do; 0 where no teacher is worth anything. Worth is relative to that of the
    best of a student's own teachers, which may all be below the smallest number."""
    K = len(edges)
    own = torch.eye(K, dtype=torch.bool, device=edges.device)[:, :, None]
    edges = edges.masked_fill(own, 0.0)
    log_worth = torch.where((edges == 0) | log_worth.isnan(), -torch.inf, log_worth)
    best = log_worth.amax(1, keepdim=True)
    worth = edges * (log_worth - torch.where(best == -torch.inf, 0.0, best)).exp()
    total = worth.sum(1, keepdim=True)
    scale = torch.where(total == 0, 0.0, edges.sum(1, keepdim=True) / total)
    return scale * worth
