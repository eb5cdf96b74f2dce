"""Scores of trained peers over a test set, from logits or features: no model, no training code."""

from __future__ import annotations

from fastdml.metrics.classification import Classification, ClassificationScores
from fastdml.metrics.distances import feature_distances, normalize_features
from fastdml.metrics.query_expansion import average_query_expansion
from fastdml.metrics.ranked_lists import ranked_list, save_ranked_lists
from fastdml.metrics.reid import (
    TIES,
    ReIDScores,
    ensemble_features,
    multi_query_features,
    reid_scores,
)
from fastdml.metrics.rerank import k_reciprocal_rerank, rerank_distances

__all__ = [
    "TIES",
    "Classification",
    "ClassificationScores",
    "ReIDScores",
    "average_query_expansion",
    "ensemble_features",
    "feature_distances",
    "k_reciprocal_rerank",
    "multi_query_features",
    "normalize_features",
    "ranked_list",
    "reid_scores",
    "rerank_distances",
    "save_ranked_lists",
]
