"""What predictions.npz of a run tells beside its scores."""

from __future__ import annotations

from typing import Any

from fastdml.analysis.agreement import agreement_of
from fastdml.analysis.gains import gains_by_confidence
from fastdml.arguments import of_kind
from fastdml.report.predictions import READ, Predictions
from fastdml.report.statistics import comparable


def analyse_predictions(
    found: Predictions | None, alone: Predictions | None = None
) -> dict[str, dict[str, Any]]:
    """Results by their name, as analysis.json has them; those that cannot be told are missing.
    alone: of the independent peers."""
    for name, value in (("found", found), ("alone", alone)):
        if value is not None:
            of_kind(name, value, Predictions, READ)
    if found is None:
        return {}
    results: dict[str, dict[str, Any]] = {}
    if len(found.peers) > 1:
        results["peer_agreement"] = agreement_of(found).to_dict()
    if alone is not None and comparable(alone, found):
        results["gains_by_confidence"] = gains_by_confidence(alone, found).to_dict()
    return results
