"""The names of the scores of an evaluation, and which of them reports show first.

Scores are a frozen dataclass of plain values: of each score a list, a value a peer in order, and
`ensemble_NAME`, that of the ensemble. Peers in several `groups` have an ensemble a group:
`group_NAME` is a list of those of the peers' groups, `ensemble_NAME` the mean. metrics.jsonl,
summary.json and checkpoints hold a dict of them.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    grouped: type | None = None  # the dataclass of peers in groups, a subclass of `scores`

    @property
    def leading(self) -> str:
        """The name of the score that a run is judged by."""
        return self.headlines[0].name

    @property
    def names(self) -> frozenset[str]:
        return frozenset(field.name for field in fields(self.scores))

    def read(self, scores: dict[str, Any]) -> Any:
        """The scores that a checkpoint holds as a dict. Raises TypeError where these are others."""
        kind = self.scores
        if self.grouped is not None and scores.keys() - self.names:
            kind = self.grouped
        return kind(**scores)

    def mean(self, scores: Any) -> float:
        """The leading score, averaged over the peers."""
        values = getattr(scores, self.leading)
        return sum(values) / len(values)


def ensembles(scores: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Each ensemble, with its name for a table and its scores by their names."""
    prefix = "ensemble_"
    names = [name.removeprefix(prefix) for name in scores if name.startswith(prefix)]
    groups = scores.get("groups", 1)
    if groups == 1:
        return [("ensemble", {name: scores[prefix + name] for name in names})]
    found = []
    for g in range(groups):
        own = {name: scores[f"group_{name}"] for name in names}
        own = {name: values[g * len(values) // groups] for name, values in own.items()}
        found.append((f"ensemble of group {g}", own))
    return found
