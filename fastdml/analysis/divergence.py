"""How far the peers are from each other over training, from the log of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdml.analysis.plots import drawn
from fastdml.arguments import of_kind, shown
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.metrics_log import read_metrics
from fastdml.report.plots import COLOURS, curve_points


@dataclass(frozen=True)
class PairwiseKL(Result):
    """KL(teacher || student) of every pair of K peers at T points of training, each the mean over
    an epoch, or over the steps since the reading before where no epoch has ended."""

    peers: tuple[str, ...]
    epochs: np.ndarray  # (T,)
    kl: np.ndarray  # (T, K, K), nats, teachers in rows; NaN on the diagonal

    @property
    def mean(self) -> np.ndarray:
        """(T,): over the pairs."""
        return self.kl[:, ~np.eye(len(self.peers), dtype=bool)].mean(axis=1)


def pairwise_kl(folder: str | Path) -> PairwiseKL:
    """Of the run in a folder; its independent peers' are below `independent`. Raises InputError for
    a folder that has no log of a run, and for a run of one peer, which has no pairs."""
    records = read_metrics(folder)
    names = records[0]["names"]
    there = [r for r in records if len(r.get("pairwise_kl") or ()) > 1]
    points, _ = curve_points(there, "train")
    if not points:
        raise InputError(f"{folder} has logged no divergence of two peers")
    kl = np.array([r["pairwise_kl"] for r in points], np.float64)  # None becomes NaN
    kl[:, np.eye(len(names), dtype=bool)] = np.nan
    return PairwiseKL(tuple(names), np.array([float(r["epoch"]) for r in points]), kl)


def plot_pairwise_kl(found: Mapping[str, PairwiseKL], where: Any) -> Any:
    """The mean over the pairs of each run, by its label, and pale beside it the single pairs.
    where: as of `drawn`."""
    if not isinstance(found, Mapping):
        raise InputError(f"found must be a dict of labels and pairwise_kl, not {shown(found)}")
    for of in found.values():
        of_kind("found", of, PairwiseKL, "pairwise_kl")

    def draw(axes: Any) -> None:
        for k, (label, of) in enumerate(found.items()):
            colour = COLOURS[k % len(COLOURS)]
            pairs = of.kl[:, ~np.eye(len(of.peers), dtype=bool)]
            axes.plot(of.epochs, pairs, color=colour, alpha=0.25, linewidth=0.6)
            axes.plot(of.epochs, of.mean, color=colour, label=label)
        axes.set(xlabel="epoch", ylabel="KL between peers (nats)", ylim=(0, None))
        axes.legend(frameon=False)

    return drawn(where, draw)
