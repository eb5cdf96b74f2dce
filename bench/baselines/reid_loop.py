"""Scores as most evaluation scripts compute them (layumi's Person_reID_baseline and its copies): a
Python loop over queries, each with its own sort and set operations of numpy. Their trapezia under
the precision curve are replaced by the precision at the matches, so that results compare.
"""

from __future__ import annotations

import numpy as np


def scores(
    distances: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery_cameras: np.ndarray,
) -> tuple[float, float]:
    """(mAP, rank-1)."""
    cmc, total, counted = np.zeros(len(gallery_ids)), 0.0, 0
    for d, identity, camera in zip(distances, query_ids, query_cameras, strict=True):
        index = np.argsort(d)
        query_index = np.argwhere(gallery_ids == identity)
        camera_index = np.argwhere(gallery_cameras == camera)
        good = np.setdiff1d(query_index, camera_index, assume_unique=True)
        junk = np.append(np.argwhere(gallery_ids == -1), np.intersect1d(query_index, camera_index))
        if len(good) == 0:
            continue
        index = index[np.isin(index, junk, invert=True)]
        rows = np.argwhere(np.isin(index, good)).flatten()
        cmc[rows[0] :] += 1
        total += sum((n + 1) / (row + 1) for n, row in enumerate(rows)) / len(good)
        counted += 1
    return total / counted, cmc[0] / counted
