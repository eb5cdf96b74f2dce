"""The names of the scores of an evaluation, and which of them reports show first.

Scores are a frozen dataclass of plain values: of each score a list, a value a peer in order, and
`ensemble_NAME`, that of the ensemble. metrics.jsonl, summary.json and checkpoints hold a dict of
them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Headline:
    """A score that tables and pictures show: a fraction of 1, the higher the better."""

    name: str  # of the scores' field, which metrics.jsonl has too
    label: str  # of a table's column and of what training says after an epoch
    entry: str  # in summary.json, before _mutual and _independent
    title: str  # above its curve, between "test" or "validation" and "(%)"
    # the field that counts the independent cases of which it is the share; "": it is no such share
    cases: str = ""


@dataclass(frozen=True)
class Scoring:
    """How one kind of scores is read and shown."""

    scores: type  # the dataclass
    headlines: tuple[Headline, ...]  # the first leads: the best weights are chosen by it
    ensemble: str  # what the ensemble is, below a table
    keeps_predictions: bool = False  # whether runs that end write predictions.npz

    @property
    def leading(self) -> str:
        """The name of the score that a run is judged by."""
        return self.headlines[0].name

    @property
    def names(self) -> frozenset[str]:
        return frozenset(field.name for field in fields(self.scores))

    def read(self, scores: dict[str, Any]) -> Any:
        """The scores that a checkpoint holds as a dict. Raises TypeError where these are others."""
        return self.scores(**scores)

    def mean(self, scores: Any) -> float:
        """The leading score, averaged over the peers."""
        values = getattr(scores, self.leading)
        return sum(values) / len(values)
