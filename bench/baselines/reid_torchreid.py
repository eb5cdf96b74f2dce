"""Scores by the usual Python loop, that of torchreid, BoT and most since: one argsort of the whole
matrix, then for each query a cumulative sum and a list of precisions, a Python number for each
gallery image.
"""

from __future__ import annotations

import numpy as np


def scores(
    distances: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery_cameras: np.ndarray,
    max_rank: int = 50,
) -> tuple[float, float]:
    """(mAP, rank-1)."""
    indices = np.argsort(distances, axis=1)
    matches = (gallery_ids[indices] == query_ids[:, np.newaxis]).astype(np.int32)
    curves, precisions = [], []
    for q in range(len(distances)):
        order = indices[q]
        own_camera = gallery_cameras[order] == query_cameras[q]
        remove = (gallery_ids[order] == query_ids[q]) & own_camera
        found = matches[q][~remove & (gallery_ids[order] != -1)]
        if not np.any(found):
            continue
        cumulated = found.cumsum()
        curve = cumulated.copy()
        curve[curve > 1] = 1
        curves.append(curve[:max_rank])
        precision = [n / (place + 1.0) for place, n in enumerate(cumulated)]
        precisions.append((np.asarray(precision) * found).sum() / found.sum())
    return float(np.mean(precisions)), float(np.mean([curve[0] for curve in curves]))
