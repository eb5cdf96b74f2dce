"""Scores by one vectorised argsort and cumulative sums over the whole (Q, G) matrix: what a careful
user of torch writes. Several matrices of Q x G numbers at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(
    distances: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
) -> tuple[float, float]:
    """(mAP, rank-1)."""
    order = distances.argsort(dim=1)
    own = gallery_ids[order] == query_ids[:, None]
    keep = ~(own & (gallery_cameras[order] == query_cameras[:, None])) & (gallery_ids[order] != -1)
    match = own & keep
    rank, nth = keep.cumsum(dim=1), match.cumsum(dim=1)
    count = match.sum(dim=1)
    counted = count > 0
    precision = torch.where(match, nth.float() / rank.clamp(min=1), 0).sum(dim=1) / count
    first = torch.where(match, rank, rank.shape[1] + 1).amin(dim=1)
    return precision[counted].mean().item(), (first[counted] == 1).float().mean().item()
