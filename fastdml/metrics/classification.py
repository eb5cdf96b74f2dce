"""Top-1, top-5, calibration error, NLL and entropy of K peers and of their ensemble.

Each batch leaves a float64 tensor on the device, (K + 1) rows of 21 sums; nothing returns to the
host before `compute`, which is one transfer and adds them in the order of the batches. A batch
costs about four passes over each peer's (N, C) logits, and one (N, C) buffer of fp32 probabilities
for the ensemble. With `keep` a fifth pass finds each row's class, and a few numbers a row stay on
the device.

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
from typing import NamedTuple

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


class Rows(NamedTuple):
    """What is kept of each row, in the order of the batches. On axis 0 the K peers, then the
    ensemble."""

    label: Tensor  # (N,) int64
    top: Tensor  # (K + 1, N) int64: the class that ranks first; -1 where there are no probabilities
    confidence: Tensor  # (K + 1, N) float32: its probability
    label_log: Tensor  # (K + 1, N) float32: log-probability of the label, in nats
    disagreement: Tensor
    """(N,) float32, in nats: entropy of the mean of the peers' probabilities less the mean of their
    entropies (the generalised Jensen-Shannon divergence), from 0, all alike, to log K."""


class Classification:
    """Sums over a test set of C classes for K peers: `update` with each batch, then `compute`.
    keep: also keeps what `rows` gives. Raises InputError for K or C below 1."""

    def __init__(
        self, K: int, C: int, device: torch.device | str = "cpu", *, keep: bool = False
    ) -> None:
        if K < 1 or C < 1:
            raise InputError(f"scores need at least one peer and one class, not K={K} and C={C}")
        self.K, self.C, self.device = K, C, torch.device(device)
        self.rows = 0
        self.keep = keep
        self.kept: list[Rows] = []  # of each batch
        self.sums: list[Tensor] = []  # of each batch, (K + 1, 21) float64

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

        found = []
        p_sum = torch.zeros(N, self.C, device=self.device)
        log_p_true = []
        for z in logits:
            z = z.float()
            log_p = z.log_softmax(dim=1)
            p = log_p.exp()
            p_sum += p
            log_p_true.append(log_p.gather(1, labels[:, None])[:, 0])
            found.append(_of_batch(z, p, log_p_true[-1], labels, bad_label, self.keep))
        # log of the mean probability from the logs, so that an underflow does not make it -inf.
        log_mean = torch.stack(log_p_true).logsumexp(dim=0) - math.log(self.K)
        p_mean = p_sum / self.K
        found.append(_of_batch(p_mean, p_mean, log_mean, labels, bad_label, self.keep))
        self.sums.append(torch.stack([batch.sums for batch in found]))
        self.rows += N
        if self.keep:
            entropy = torch.stack([batch.entropy for batch in found])
            self.kept.append(
                Rows(
                    label=labels,
                    top=torch.stack([batch.top for batch in found if batch.top is not None]),
                    confidence=torch.stack([batch.confidence for batch in found]),
                    label_log=torch.stack([*log_p_true, log_mean]),
                    disagreement=(entropy[-1] - entropy[:-1].mean(0)).clamp_min_(0),
                )
            )

    def compute(self) -> ClassificationScores:
        """The scores over everything added so far, as plain numbers. Raises InputError where
        nothing was added or a label is out of range."""
        if self.rows == 0:
            raise InputError("there is nothing to score: the test set gave no rows")
        totals = torch.zeros(self.K + 1, COLUMNS, dtype=torch.float64)
        for sums in torch.stack(self.sums).cpu():
            totals += sums
        if bad := int(totals[0, BAD_LABEL]):
            raise InputError(f"{bad} of {self.rows} labels lie outside 0..{self.C - 1}")
        ece = totals[:, 6:].abs().sum(dim=1)
        ece[totals[:, NONFINITE] > 0] = torch.nan
        means = torch.cat([totals[:, :NONFINITE], ece[:, None]], dim=1) / self.rows
        top1, top5, nll, entropy, ece = means.T.tolist()
        return ClassificationScores(
            rows=self.rows,
            top1=top1[:-1],
            top5=top5[:-1],
            ece=ece[:-1],
            nll=nll[:-1],
            entropy=entropy[:-1],
            nonfinite=[int(n) for n in totals[:-1, NONFINITE]],
            ensemble_top1=top1[-1],
            ensemble_top5=top5[-1],
            ensemble_ece=ece[-1],
            ensemble_nll=nll[-1],
            ensemble_entropy=entropy[-1],
        )

    def kept_rows(self) -> Rows:
        """What `keep` kept of everything added so far, on the device. Raises InputError where it
        was not to keep anything."""
        if not self.keep:
            raise InputError("nothing was kept of the rows: make Classification with keep=True")
        ints = torch.zeros(self.K + 1, 0, dtype=torch.int64, device=self.device)
        none = Rows(ints[0], ints, ints.float(), ints.float(), ints[0].float())
        parts = zip(none, *self.kept, strict=True)
        return Rows(*(torch.cat(tensors, dim=-1) for tensors in parts))


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
