"""What trained peers are worth: scores over a test set, free of any model or training code."""

from __future__ import annotations

from fastdml.metrics.classification import Classification, ClassificationScores
from fastdml.metrics.reid import (
    ReIDScores,
    ensemble_features,
    feature_distances,
    multi_query_features,
    normalize_features,
    reid_scores,
)

__all__ = [
    "Classification",
    "ClassificationScores",
    "ReIDScores",
    "ensemble_features",
    "feature_distances",
    "multi_query_features",
    "normalize_features",
    "reid_scores",
]
