"""Re-ranking as it is usually written (Zhong et al. 2017, and every copy since): matrices of
(Q + G)**2 numbers for the distances, their order and the encodings, and Python loops over images.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def rerank(
    query_features: Tensor, gallery_features: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """(Q, G) in float32."""
    Q = len(query_features)
    x = np.concatenate([query_features.numpy(), gallery_features.numpy()])
    N = len(x)
    squares = (x**2).sum(axis=1)
    distance = np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0)
    np.fill_diagonal(distance, 0)
    distance = (distance / distance.max(axis=0)).T
    order = np.argsort(distance, axis=1)

    def mutual(i: int, k: int) -> np.ndarray:
        forward = order[i, : k + 1]
        backward = order[forward, : k + 1]
        return forward[np.where(backward == i)[0]]

    encoding = np.zeros((N, N), np.float32)
    for i in range(N):
        own = mutual(i, k1)
        expanded = own
        for candidate in own:
            other = mutual(candidate, round(k1 / 2))
            if 3 * len(np.intersect1d(other, own)) > 2 * len(other):
                expanded = np.append(expanded, other)
        expanded = np.unique(expanded)
        near = np.exp(-distance[i, expanded])
        encoding[i, expanded] = near / near.sum()
    if k2 > 1:
        encoding = np.stack([encoding[order[i, :k2]].mean(axis=0) for i in range(N)])
    listed = [np.where(encoding[:, i] != 0)[0] for i in range(N)]

    jaccard = np.zeros((Q, N), np.float32)
    for i in range(Q):
        shared = np.zeros(N, np.float32)
        for j in np.where(encoding[i] != 0)[0]:
            shared[listed[j]] += np.minimum(encoding[i, j], encoding[listed[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return (jaccard * (1 - weight) + distance[:Q] * weight)[:, Q:]
