"""How alike the peers answer, and whether they err on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdml.analysis.plots import drawn, heat_map
from fastdml.arguments import listed, numbers, of_kind
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.predictions import READ, Predictions


@dataclass(frozen=True)
class PeerAgreement(Result):
    """Of K peers on N images; matrices are (K, K) and symmetric."""

    peers: tuple[str, ...]
    images: int
    same: np.ndarray  # share of the images that both give the same class
    kappa: np.ndarray
    """Cohen's kappa: (same - chance) / (1 - chance), chance being the share that two peers would
    have in common who name each class as often, but on images at random. NaN where that is 1."""
    both_wrong: np.ndarray  # share of the images; on the diagonal each peer's error
    overlap: np.ndarray
    """both_wrong over the product of the two errors: 1 where they err independently of each other.
    NaN where one of them never errs."""
    same_error: np.ndarray  # of the images both get wrong, the share given the same wrong class
    any_right: float  # share of the images that at least one peer gets right
    jsd: float
    """Generalised Jensen-Shannon divergence between the peers' probabilities, in nats, the mean
    over images; NaN where it is not known."""


def peer_agreement(
    predicted: Any, labels: Any, names: Sequence[str], *, disagreement: Any = None
) -> PeerAgreement:
    """Agreement of K peers. predicted: (K, N) classes, -1 for none, which is wrong and agrees with
    nothing. labels: (N,) classes. names: K. disagreement: (N,), the Jensen-Shannon divergence of
    each image, as predictions.npz has it. Raises InputError for what does not fit."""
    top, label = numbers("predicted", predicted), numbers("labels", labels)
    names = listed("names", names, "names, one a peer")
    if top.ndim != 2 or not top.size or label.shape != top.shape[1:] or len(names) != len(top):
        raise InputError(
            f"predicted must be (K, N), labels (N,) and names K, not {list(top.shape)}, "
            f"{list(label.shape)} and {len(names)}"
        )
    for name, values, low in (("predicted", top, -1), ("labels", label, 0)):
        if values.dtype.kind not in "iu" or values.min() < low:
            raise InputError(f"{name} must be whole numbers, {low} or more")
    K, N = top.shape
    apart = np.full(N, np.nan) if disagreement is None else numbers("disagreement", disagreement)
    if apart.shape != (N,):
        raise InputError(f"disagreement must be ({N},), one an image, not {list(apart.shape)}")
    wrong = top != label
    C = int(max(top.max(), label.max())) + 1
    shares = np.stack([np.bincount(row[row >= 0], minlength=C) for row in top]) / N  # (K, C)
    chance = shares @ shares.T
    same, common = np.empty((K, K)), np.empty((K, K))
    both = wrong.astype(np.float64) @ wrong.T / N
    for i, j in np.ndindex(K, K):
        alike = (top[i] == top[j]) & (top[i] >= 0)
        same[i, j] = alike.mean()
        common[i, j] = (alike & wrong[i]).mean()
    error = wrong.mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return PeerAgreement(
            peers=tuple(names),
            images=N,
            same=same,
            kappa=np.where(chance < 1, (same - chance) / (1 - chance), np.nan),
            both_wrong=both,
            overlap=both / np.outer(error, error),
            same_error=common / both,
            any_right=float((~wrong).any(axis=0).mean()),
            jsd=float(apart.mean(dtype=np.float64)),
        )


def agreement_of(found: Predictions) -> PeerAgreement:
    """Of the peers of a run, from its predictions."""
    found = of_kind("found", found, Predictions, READ)
    K = len(found.peers)
    return peer_agreement(found.top[:K], found.label, found.peers, disagreement=found.disagreement)


def plot_agreement(found: PeerAgreement, where: Any) -> Any:
    """The share of equal predictions of each pair, as a heat map. where: as of `drawn`."""
    of_kind("found", found, PeerAgreement, "peer_agreement")
    matrix = np.where(np.eye(len(found.peers), dtype=bool), np.nan, 100 * found.same)

    def draw(axes: Any) -> None:
        heat_map(axes, matrix, found.peers, found.peers, "{:.1f}")
        axes.set_title("equal predictions (%)", loc="left")

    return drawn(where, draw, height=0.9 + 0.4 * len(found.peers))
