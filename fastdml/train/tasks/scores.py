"""The scores of an evaluation as the trainer sees them: two kinds, plain values, a value a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdml.metrics import ClassificationScores, ReIDScores

RANKS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalScores:
    """Fractions of 1 over the queries that have a match; a value a peer, in order."""

    queries: int
    mAP: list[float]
    mINP: list[float]
    rank1: list[float]
    rank5: list[float]
    rank10: list[float]
    ensemble_mAP: float
    ensemble_mINP: float
    ensemble_rank1: float
    ensemble_rank5: float
    ensemble_rank10: float

    @classmethod
    def of(cls, peers: Sequence[ReIDScores], ensemble: ReIDScores) -> RetrievalScores:
        """From the scores of each peer and of their features put together."""
        values: dict[str, Any] = {"queries": ensemble.queries}
        for name in ("mAP", "mINP"):
            values[name] = [getattr(scores, name) for scores in peers]
            values[f"ensemble_{name}"] = getattr(ensemble, name)
        for k in RANKS:
            values[f"rank{k}"] = [scores.rank(k) for scores in peers]
            values[f"ensemble_rank{k}"] = ensemble.rank(k)
        return cls(**values)


Scores = ClassificationScores | RetrievalScores


def main_name(scores: dict[str, Any]) -> str:
    """Of scores as a dict: the one that a run is judged by, and the best weights chosen by."""
    return "mAP" if "mAP" in scores else "top1"


def main_values(scores: Scores) -> list[float]:
    return scores.mAP if isinstance(scores, RetrievalScores) else scores.top1


def from_dict(scores: dict[str, Any]) -> Scores:
    kind = RetrievalScores if "mAP" in scores else ClassificationScores
    return kind(**scores)
