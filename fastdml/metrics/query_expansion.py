"""Query expansion: a query is asked again as the mean of itself and of what it found first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdml.errors import InputError
from fastdml.metrics.distances import ComputedDistances, check_squares, normalize_features

BLOCK = 1 << 24  # similarities held at once


@torch.no_grad()
def average_query_expansion(
    query_features: Tensor,
    gallery_features: Tensor,
    n: int,
    *,
    alpha: float = 0.0,
    block: int = BLOCK,
) -> Tensor:
    """(Q, D), each row of unit length: features (Q, D) with those of their `n` nearest of (G, D).

    A query becomes the normalised sum of itself and of the n gallery images most similar to it,
    each of unit length and weighted by max(cosine, 0) to the power of alpha. With alpha 0 it is
    average query expansion (Chum et al., "Total Recall: Automatic Query Expansion with a Generative
    Feature Model for Object Retrieval", ICCV 2007), above that alpha query expansion, which trusts
    distant images less (Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, with alpha 3). No labels are read: the images may show anybody, and the
    query's own camera. In float64 where either features are, else in float32; memory is a block.

    Raises InputError on wrong shapes and settings, and where a feature or its square is not finite.
    """
    source = ComputedDistances(query_features, gallery_features, "cosine")
    Q, G = source.shape
    if min(n, block) < 1 or not 0 <= alpha < math.inf:
        raise InputError(
            f"n={n}, block={block}, alpha={alpha}: the first two must be at least 1, and alpha a "
            "number from 0 on"
        )
    if not Q or not G:
        raise InputError(f"{Q} queries against {G} gallery images")
    for name, x in (("query", query_features), ("gallery", gallery_features)):
        check_squares(x, name, source.query.dtype, "nothing to expand")
    n = min(n, G)
    found = []
    for queries in torch.arange(Q).split(max(1, block // max(G, n * query_features.shape[1]))):
        d, place = source.block(queries).topk(n, dim=1, largest=False)  # (B, n), minus the cosine
        weight = d.neg_().clamp_(min=0).pow_(alpha)
        near = normalize_features(source.gallery[place].flatten(0, 1)).view(*place.shape, -1)
        near.mul_(weight[..., None])
        found.append(near.sum(dim=1).add_(source.query[queries.to(near.device)]))
    return normalize_features(torch.cat(found))
