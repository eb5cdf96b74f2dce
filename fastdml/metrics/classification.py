"""Top-1, top-5, calibration error, NLL and entropy of K peers and of their ensemble.

Each batch leaves a float64 tensor on the device, (K + 1) rows of 21 sums; nothing returns to the
host before `compute`, which is one transfer and adds them in the order of the batches. A batch
costs about four passes over each peer's (N, C) logits, and one (N, C) buffer of fp32 probabilities
for the ensemble. With `keep` a fifth pass finds each row's class, and a few numbers a row stay on
the device.

Peers in groups that did not learn from each other have an ensemble a group, in place of one.

Rules, the same for every peer and for the ensemble (the mean of the peers' probabilities):
- Ties: of equal scores the lowest class index ranks first, as numpy's argmax has it.
- Top-5 is top-min(5, C).
- Expected calibration error (Guo et al. 2017): 15 bins of equal width over the confidence
  max_c p, the m-th holding ((m - 1) / 15, m / 15]; the mean over rows of |accuracy - confidence|
  of the row's bin.
- A row without probabilities (a NaN, a +inf, or nothing but -inf among its logits) counts as
  wrong and is counted in `nonfinite`; it turns NLL, entropy and calibration error into NaN, so
  that it cannot hide in a mean. The ensemble has no probabilities where any peer has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdml.errors import InputError

BINS = 15
# Columns of the totals: five sums over rows, the rows whose label is out of range, then the bins'
# sums of (right - confidence).
TOP1, TOP5, NLL, ENTROPY, NONFINITE, BAD_LABEL = range(6)
COLUMNS = 6 + BINS


@dataclass(frozen=True)
class ClassificationScores:
    """Fractions of 1 (top1, top5, ece) and nats (nll, entropy); a value a peer, in order."""

    rows: int
    top1: list[float]
    top5: list[float]
    ece: list[float]
    nll: list[float]
    entropy: list[float]
    nonfinite: list[int]
    ensemble_top1: float
    ensemble_top5: float
    ensemble_ece: float
    ensemble_nll: float
    ensemble_entropy: float


@dataclass(frozen=True)
class GroupedScores(ClassificationScores):
    """Of peers in groups: group_NAME has for each peer the score of its group's ensemble, and
    ensemble_NAME is the mean over the groups."""

    groups: int
    group_top1: list[float]
    group_top5: list[float]
    group_ece: list[float]
    group_nll: list[float]
    group_entropy: list[float]


class Rows(NamedTuple):
    """What is kept of each row, in the order of the batches. On axis 0 the K peers, then the
    ensemble, of G groups the G ensembles."""

    label: Tensor  # (N,) int64
    top: Tensor  # (K + G, N) int64: the class that ranks first; -1 where there are no probabilities
    confidence: Tensor  # (K + G, N) float32: its probability
    label_log: Tensor  # (K + G, N) float32: log-probability of the label, in nats
    disagreement: Tensor
    """(N,) float32, in nats: entropy of the mean of the peers' probabilities less the mean of their
    entropies (the generalised Jensen-Shannon divergence), from 0, all alike, to log K. Of several
    groups (G, N), within each."""

    def of_group(self, g: int, groups: int) -> Rows:
        """Those of one of several groups, as if there were no other."""
        size = len(self.top) // groups - 1
        own = [*range(g * size, (g + 1) * size), groups * size + g]
        top, confidence, label_log = (t[own] for t in (self.top, self.confidence, self.label_log))
        return Rows(self.label, top, confidence, label_log, self.disagreement[g])


class Classification:
    """Sums over a test set of C classes for K peers in equal groups, by default one: `update` with
    each batch, then `compute`. keep: also keeps what `rows` gives. Raises InputError for K or C
    below 1."""

    def __init__(
        self,
        K: int,
        C: int,
        device: torch.device | str = "cpu",
        *,
        keep: bool = False,
        groups: int = 1,
    ) -> None:
        if K < 1 or C < 1:
            raise InputError(f"scores need at least one peer and one class, not K={K} and C={C}")
        self.K, self.C, self.device = K, C, torch.device(device)
        self.groups, self.size = groups, K // groups
        self.rows = 0
        self.keep = keep
        self.kept: list[Rows] = []  # of each batch
        self.sums: list[Tensor] = []  # of each batch, (K + groups, 21) float64

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Adds a batch: K logits (N, C) of any floating dtype, labels (N,) int64 or int32 within
        0..C-1, on the device of the sums. Raises InputError for other shapes; a label out of range
        is counted here and refused by `compute`, so that no batch waits for the device."""
        N = len(labels)
        if len(logits) != self.K or any(z.shape != (N, self.C) for z in logits):
            shapes = ", ".join(str(tuple(z.shape)) for z in logits)
            raise InputError(
                f"logits of shape {shapes} for {N} labels; expected {self.K} of ({N}, {self.C})"
            )
        bad_label = (labels < 0) | (labels >= self.C)
        # (N,) within range, since an index out of range leaves a CUDA context unusable
        labels = labels.long().clamp(0, self.C - 1)

        found, ensembles, log_means = [], [], []
        log_p_true: list[Tensor] = []
        for k, z in enumerate(logits):
            if k % self.size == 0:
                p_sum = torch.zeros(N, self.C, device=self.device)
            z = z.float()
            log_p = z.log_softmax(dim=1)
            p = log_p.exp()
            p_sum += p
            log_p_true.append(log_p.gather(1, labels[:, None])[:, 0])
            found.append(_of_batch(z, p, log_p_true[-1], labels, bad_label, self.keep))
            if k % self.size < self.size - 1:
                continue
            # log of the mean probability from the logs, so that an underflow does not make it -inf.
            own = torch.stack(log_p_true[-self.size :])
            log_means.append(own.logsumexp(dim=0) - math.log(self.size))
            p_mean = p_sum / self.size
            ensembles.append(_of_batch(p_mean, p_mean, log_means[-1], labels, bad_label, self.keep))
        self.sums.append(torch.stack([batch.sums for batch in [*found, *ensembles]]))
        self.rows += N
        if self.keep:
            both = [*found, *ensembles]
            apart = torch.stack(
                [
                    mean.entropy - torch.stack([one.entropy for one in own]).mean(0)
                    for mean, own in zip(ensembles, _in_groups(found, self.size), strict=True)
                ]
            ).clamp_min_(0)
            self.kept.append(
                Rows(
                    label=labels,
                    top=torch.stack([batch.top for batch in both if batch.top is not None]),
                    confidence=torch.stack([batch.confidence for batch in both]),
                    label_log=torch.stack([*log_p_true, *log_means]),
                    disagreement=apart[0] if self.groups == 1 else apart,
                )
            )

    def compute(self) -> ClassificationScores:
        """The scores over everything added so far, as plain numbers. Raises InputError where
        nothing was added or a label is out of range."""
        if self.rows == 0:
            raise InputError("there is nothing to score: the test set gave no rows")
        totals = torch.zeros(self.K + self.groups, COLUMNS, dtype=torch.float64)
        for sums in torch.stack(self.sums).cpu():
            totals += sums
        if bad := int(totals[0, BAD_LABEL]):
            raise InputError(f"{bad} of {self.rows} labels lie outside 0..{self.C - 1}")
        ece = totals[:, 6:].abs().sum(dim=1)
        ece[totals[:, NONFINITE] > 0] = torch.nan
        means = torch.cat([totals[:, :NONFINITE], ece[:, None]], dim=1) / self.rows
        K, size = self.K, self.size
        values: dict[str, Any] = {"groups": self.groups} if self.groups > 1 else {}
        for name, column in zip(("top1", "top5", "nll", "entropy", "ece"), means.T, strict=True):
            own = column.tolist()
            values[name], values[f"ensemble_{name}"] = own[:K], own[-1]
            if self.groups > 1:
                values[f"ensemble_{name}"] = float(column[K:].mean())
                values[f"group_{name}"] = [own[K + k // size] for k in range(K)]
        kind = ClassificationScores if self.groups == 1 else GroupedScores
        nonfinite = [int(n) for n in totals[:K, NONFINITE]]
        return kind(rows=self.rows, nonfinite=nonfinite, **values)

    def kept_rows(self) -> Rows:
        """What `keep` kept of everything added so far, on the device. Raises InputError where it
        was not to keep anything."""
        if not self.keep:
            raise InputError("nothing was kept of the rows: make Classification with keep=True")
        ints = torch.zeros(self.K + self.groups, 0, dtype=torch.int64, device=self.device)
        apart = ints[0] if self.groups == 1 else ints[: self.groups]
        none = Rows(ints[0], ints, ints.float(), ints.float(), apart.float())
        parts = zip(none, *self.kept, strict=True)
        return Rows(*(torch.cat(tensors, dim=-1) for tensors in parts))


def _in_groups(found: list[_OfBatch], size: int) -> list[list[_OfBatch]]:
    return [found[start : start + size] for start in range(0, len(found), size)]


class _OfBatch(NamedTuple):
    """Of one peer, or of the ensemble."""

    sums: Tensor  # one row of the totals, (21,), in float64
    confidence: Tensor  # (N,)
    entropy: Tensor  # (N,)
    top: Tensor | None  # (N,), if asked for


def _of_batch(
    ranked_by: Tensor,  # (N, C): logits, or the ensemble's probabilities
    p: Tensor,  # (N, C)
    log_p_true: Tensor,  # (N,): log-probability of the label
    labels: Tensor,  # (N,)
    bad_label: Tensor,  # (N,)
    keep: bool,
) -> _OfBatch:
    C = p.shape[1]
    true = ranked_by.gather(1, labels[:, None])
    before = torch.arange(C, device=p.device) < labels[:, None]
    # How many classes come before the true one; comparisons with NaN are all false, hence `finite`.
    rank = ((ranked_by > true) | ((ranked_by == true) & before)).sum(dim=1)  # (N,)
    confidence = p.amax(dim=1)  # (N,): amax keeps NaN
    finite = confidence.isfinite()
    top1 = (rank == 0) & finite
    top5 = (rank < min(5, C)) & finite

    # Every row is compared with every bin, rather than added to its bin by a scatter, whose order
    # of summation on a GPU, and so the rounding, changes from run to run.
    bins = (confidence * BINS).ceil().sub(1).clamp(0, BINS - 1)
    in_bin = bins[:, None] == torch.arange(BINS, device=p.device)  # (N, 15); NaN is in none
    gap = torch.where(finite, top1.double() - confidence, 0.0)
    gaps = (in_bin * gap[:, None]).sum(dim=0)

    entropy = torch.special.entr(p).sum(dim=1)
    columns = torch.stack(
        [c.double().sum() for c in (top1, top5, -log_p_true, entropy, ~finite, bad_label)]
    )
    # torch's argmax gives the first of equal scores, as `rank` does.
    top = torch.where(finite, ranked_by.argmax(dim=1), -1) if keep else None
    return _OfBatch(torch.cat([columns, gaps]), confidence, entropy, top)
