"""Distances between features, or given ones, a few queries at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdml.errors import InputError

METRICS = ("cosine", "euclidean")


@torch.no_grad()
def feature_distances(
    query_features: Tensor, gallery_features: Tensor, metric: str = "cosine"
) -> Tensor:
    """Distances (Q, G) of features (Q, D) and (G, D): 1 - cosine, or Euclidean; in float64 where
    the features are, else in float32. Raises InputError for an unknown metric or other shapes."""
    source = ComputedDistances(query_features, gallery_features, metric)
    d = source.block(torch.arange(len(query_features)))
    if metric == "cosine":
        return d.add_(1)
    return d.add_(source.query.square().sum(dim=1, keepdim=True)).clamp_(min=0).sqrt_()


def normalize_features(features: Tensor) -> Tensor:
    """Features (N, D) scaled to unit length, in float64 where they are float64, else in float32;
    rows of zeros stay zeros."""
    return F.normalize(in_full(features), dim=1)


class GivenDistances:
    """Rows of a matrix of distances (Q, G)."""

    def __init__(self, distances: Tensor) -> None:
        if distances.ndim != 2 or not distances.is_floating_point():
            raise InputError(
                f"distances {tuple(distances.shape)} of {distances.dtype}: give (Q, G) of a "
                "floating dtype"
            )
        self.distances, self.shape = distances, tuple(distances.shape)

    def block(self, queries: Tensor) -> Tensor:
        """Rows (B, G) of `queries` (B,) int64; a copy."""
        return in_full(self.distances[queries.to(self.distances.device)])

    def offset(self, queries: Tensor) -> None:
        """None: rows of different queries compare as they are."""


class ComputedDistances:
    """Rows of a function of the distance that orders a query's gallery as the distance does:
    minus the cosine, or the squared Euclidean distance less the query's square. The gallery is
    not copied to be normalised."""

    def __init__(self, query: Tensor | None, gallery: Tensor | None, metric: str) -> None:
        check_metric(metric)
        if query is None or gallery is None:
            raise InputError("give the features of queries and gallery, or distances")
        if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
            raise InputError(
                f"features {tuple(query.shape)} and {tuple(gallery.shape)}: give (Q, D) and (G, D)"
            )
        self.shape = len(query), len(gallery)
        self.metric = metric
        query, gallery = in_full(query), in_full(gallery)
        dtype = torch.promote_types(query.dtype, gallery.dtype)
        self.query, self.gallery = query.to(dtype), gallery.to(dtype)
        # (G,), a few rows at a time: no second gallery; of whole numbers it is exact
        self.square = torch.cat([g.square().sum(dim=1) for g in self.gallery.split(4096)])
        if metric == "cosine":
            self.query = F.normalize(self.query, dim=1)
            self.scale = self.square.sqrt().clamp(min=1e-12).reciprocal()

    def block(self, queries: Tensor) -> Tensor:
        """Rows (B, G) of `queries` (B,) int64; a new tensor."""
        query = self.query[queries.to(self.query.device)]
        with torch.autocast(query.device.type, enabled=False):
            if self.metric == "cosine":
                return (query.neg() @ self.gallery.T).mul_(self.scale)
            return torch.addmm(self.square, query, self.gallery.T, alpha=-2)

    def offset(self, queries: Tensor) -> Tensor | None:
        """(B, 1): added to the rows of `queries` it makes those of different queries compare; None
        where they do as they are."""
        if self.metric == "cosine":
            return None
        query = self.query[queries.to(self.query.device)]
        return query.square().sum(dim=1, keepdim=True)


def check_metric(metric: str) -> None:
    """Raises InputError where there is no such distance."""
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}: give one of {', '.join(METRICS)}")


def check_squares(x: Tensor, name: str, dtype: torch.dtype, remedy: str) -> None:
    """Raises InputError where rows of x (N, D) are not finite, or so large that their squares are
    not in `dtype`, which would make them nothing or NaN without a word."""
    parts = [part.to(dtype).square().sum(dim=1) for part in x.split(4096)]
    if bad := sum(int((~part.isfinite()).sum()) for part in parts):
        finite = bool(x.sum(dim=1, dtype=torch.float64).isfinite().all())
        kind = f"too large to be squared in {dtype}" if finite else "not finite"
        raise InputError(f"{bad} of {len(x)} {name} features are {kind}: {remedy}")


def in_full(x: Tensor) -> Tensor:
    """Half precisions as float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()
