"""Losses on features as the usual code has them: torchreid's batch-hard triplet loss with its loop
over anchors, and BoT's center loss with its matrix of all centres.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def triplet(features: Tensor, labels: Tensor, margin: float = 0.3) -> Tensor:
    N = len(features)
    squares = features.pow(2).sum(dim=1, keepdim=True).expand(N, N)
    d = torch.addmm(squares + squares.t(), features, features.t(), alpha=-2)
    d = d.clamp(min=1e-12).sqrt()
    same = labels.expand(N, N).eq(labels.expand(N, N).t())
    furthest, nearest = [], []
    for i in range(N):
        furthest.append(d[i][same[i]].max().unsqueeze(0))
        nearest.append(d[i][same[i] == 0].min().unsqueeze(0))
    furthest, nearest = torch.cat(furthest), torch.cat(nearest)
    return F.margin_ranking_loss(nearest, furthest, torch.ones_like(nearest), margin=margin)


def center(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    N, C = len(features), len(centers)
    d = features.pow(2).sum(dim=1, keepdim=True).expand(N, C)
    d = d + centers.pow(2).sum(dim=1, keepdim=True).expand(C, N).t()
    d = torch.addmm(d, features, centers.t(), alpha=-2)
    mask = labels[:, None].expand(N, C).eq(torch.arange(C, device=labels.device).expand(N, C))
    return (d * mask.float()).clamp(min=1e-12, max=1e12).sum() / N
