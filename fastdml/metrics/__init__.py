"""What trained peers are worth: scores over a test set, free of any model or training code."""

from __future__ import annotations

from fastdml.metrics.classification import Classification, ClassificationScores

__all__ = ["Classification", "ClassificationScores"]
