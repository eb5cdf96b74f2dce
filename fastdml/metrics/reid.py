"""Retrieval scores of re-identification: CMC, mAP and mINP, by counting and without a sort.

An image's rank is needed for the matching gallery images only, and is one more than the number of
images that are nearer. So each query costs its distances, one GEMM row, and M G comparisons for M
matches: about 15 on Market-1501, where 3,368 queries against 15,913 images then take a tenth of a
second on two cores once the distances are there. Memory: `block` distances (64 MB) and a few
MB that stay in the cache, whatever the gallery's size; no Q x G buffer.

Rules, those of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV
2015):
- Gallery images of identity -1 (junk) do not exist. Identity 0 (distractors) is an identity like
  any other, that nobody asks for.
- A query's matches are the gallery images of its identity from other cameras. Those from its own
  camera are left out for it, neither right nor wrong.
- A query without a match is not counted.
- Ties, "worst" (the default): of images at equal distance those of other identities rank first. So
  scores do not depend on the order of the files, and distances that are all equal score worst
  instead of by luck. "given": images at equal distance rank in the order of the gallery, as a
  stable argsort leaves them. Where no distances are equal both give the same numbers. Distances
  computed from features are rounded, equal features to equal distances only where sums are exact,
  as Euclidean ones of whole numbers are. A distance that is NaN counts as infinitely far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdml.errors import InputError
from fastdml.metrics.distances import (
    ComputedDistances,
    GivenDistances,
    in_full,
    normalize_features,
)
from fastdml.metrics.verification import Verification

JUNK = -1
TIES = ("worst", "given")
BLOCK = 1 << 24  # distances held at once
# Comparisons made at once: on a CPU what stays in the cache (2**19 and 2**22 are slower), on a GPU
# enough to fill it.
COMPARISONS = {"cpu": 1 << 21, "cuda": 1 << 24}
NARROW = 256  # columns compared at once where equal distances rank by their column
NEARBY = 1 << 20  # distances gathered at once for those near a match


@dataclass(frozen=True)
class ReIDScores:
    """Fractions of 1. `cmc[k - 1]` is the share of queries with a match among the first k."""

    mAP: float
    cmc: list[float]  # (max_rank,)
    mINP: float
    queries: int  # that have a match, and so count
    tpr: dict[float, float] = field(default_factory=dict)  # by false positive rate

    def rank(self, k: int) -> float:
        """The share of queries with a match among the first k: rank(1) is "rank-1"."""
        if not 1 <= k <= len(self.cmc):
            raise InputError(f"rank {k}: this curve has ranks 1 to {len(self.cmc)}")
        return self.cmc[k - 1]


@torch.no_grad()
def reid_scores(
    query_features: Tensor | None,
    gallery_features: Tensor | None,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    *,
    metric: str = "cosine",
    max_rank: int = 50,
    distances: Tensor | None = None,
    ties: str = "worst",
    fprs: Sequence[float] = (),
    block: int = BLOCK,
) -> ReIDScores:
    """Scores of queries (Q, D) against a gallery (G, D), or of given distances (Q, G).

    Features are of any floating dtype and are compared in float32 (float64 in float64); identities
    and cameras are integers (Q,) and (G,), on any device. With `distances`, features may be None.

    - mAP: the mean over queries of the average precision, which is the mean, over a query's M
      matches, of the precision at the match's rank, as is usual since Market-1501 (whose first
      code took trapezia between the matches).
    - ties: how equal distances rank, "worst" or "given"; features of few values (bits, hashes) have
      many. Compare those by metric="euclidean", which is exact for whole numbers.
    - mINP: the mean of M over the rank of the last match (Ye et al., "Deep Learning for Person
      Re-identification: A Survey and Outlook", TPAMI 2021).
    - fprs: false positive rates, such as 1e-3, to find the true positive rates `tpr` at
      (verification: do two images show the same person?). A pair is a counted query and a gallery
      image. It is genuine if they have one identity and two cameras, an impostor if they have two
      identities, from whatever cameras, and neither if they have one identity and one camera. One
      threshold holds for all queries: the largest that accepts no more than this share of the
      impostors, equal distances together. Exact; the memory is bounded, see `verification`.

    Raises InputError on shapes that do not fit together, and where no query has a match.
    """
    Q, G = _check_ids(query_ids, gallery_ids, query_cameras, gallery_cameras)
    if max_rank < 1 or block < 1:
        raise InputError(f"max_rank={max_rank}, block={block}: both must be at least 1")
    check_ties(ties)
    if distances is None:
        source: GivenDistances | ComputedDistances = ComputedDistances(
            query_features, gallery_features, metric
        )
    else:
        source = GivenDistances(distances)
    if source.shape != (Q, G):
        raise InputError(
            f"distances or features of {source.shape[0]} x {source.shape[1]} images, but "
            f"identities of {Q} queries and {G} gallery images"
        )
    own = _OwnImages(query_ids, gallery_ids, query_cameras, gallery_cameras)
    if not len(own.counted):
        raise InputError(
            f"none of the {Q} queries has a gallery image of its identity from another camera: "
            "nothing can be scored"
        )
    pairs = Verification(fprs, own.impostors) if fprs else None
    found = []
    for queries in own.counted.split(max(1, block // G)):
        d = source.block(queries)  # (B, G)
        row, image, match = own.of(queries)
        near = _take_matches(d, row, image, match, own.junk)
        row, image = row[match], image[match]
        if pairs:
            offset = source.offset(queries)
            if offset is None:
                pairs.add(near, d)
            else:
                pairs.add(near + offset[row.to(d.device), 0], d + offset)
        found.append(_query_scores(d, near, row, image, ties))
    precision, inverse_penalty, first = torch.cat(found, dim=1).cpu()
    cmc = (first[:, None] <= torch.arange(1, max_rank + 1)).double().mean(dim=0)
    return ReIDScores(
        mAP=precision.mean().item(),
        cmc=cmc.tolist(),
        mINP=inverse_penalty.mean().item(),
        queries=len(own.counted),
        tpr=pairs.rates() if pairs else {},
    )


def ensemble_features(features: Sequence[Tensor]) -> Tensor:
    """One description (N, sum of D_k) of unit length from K peers' (N, D_k): concatenated, as in
    the paper (Zhang et al., CVPR 2018), each of unit length first so that none outweighs the
    others; the cosine similarity of the whole is the mean of the peers'. Raises InputError for no
    peers, or features of different numbers of images."""
    if not features:
        raise InputError("an ensemble needs the features of at least one peer")
    if len({len(f) for f in features}) > 1:
        raise InputError(f"peers with features of {[len(f) for f in features]} images")
    return normalize_features(torch.cat([normalize_features(f) for f in features], dim=1))


@torch.no_grad()
def multi_query_features(
    features: Tensor,
    ids: Tensor,
    cameras: Tensor,
    query_ids: Tensor,
    query_cameras: Tensor,
    query_features: Tensor | None = None,
) -> Tensor:
    """(Q, D): for each query the mean of the features (M, D) of the images of its identity and
    camera (Zheng et al., ICCV 2015, section 5.4; Market-1501 keeps these images in gt_bbox), in
    float64 where the features are, else in float32. A query without such an image keeps its own of
    `query_features` (Q, D). Normalise features first, so that each image weighs the same.

    Raises InputError for shapes that do not fit together, and for a query without such an image
    where `query_features` is not given.
    """
    images, Q = len(features), len(query_ids)
    if features.ndim != 2 or not images == len(ids) == len(cameras) or len(query_cameras) != Q:
        raise InputError(
            f"features {tuple(features.shape)} with {len(ids)} identities and {len(cameras)} "
            f"cameras, for {Q} query identities and {len(query_cameras)} cameras"
        )
    features = in_full(features)
    keys = torch.stack([torch.cat([ids, query_ids]), torch.cat([cameras, query_cameras])], dim=1)
    groups, group = keys.unique(dim=0, return_inverse=True)
    group = group.to(features.device)
    # float64 sums: the mean does not depend on the order of the images
    sums = features.new_zeros(len(groups), features.shape[1], dtype=torch.float64)
    sums.index_add_(0, group[:images], features.double())
    size = torch.bincount(group[:images], minlength=len(groups))
    asked = group[images:]
    mean = (sums / size[:, None])[asked].to(features.dtype)
    missing = size[asked] == 0
    if query_features is not None:
        return torch.where(missing[:, None], in_full(query_features).to(mean.device), mean)
    if missing.any():
        first = int(missing.nonzero()[0])
        raise InputError(
            f"{int(missing.sum())} of {Q} queries have no image of their identity and camera, "
            f"identity {int(query_ids[first])} of camera {int(query_cameras[first])} for one: give "
            "query_features"
        )
    return mean


class _OwnImages:
    """Each query's gallery images of its own identity, as index lists on the host."""

    def __init__(
        self, query_ids: Tensor, gallery_ids: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
    ) -> None:
        ids, gallery_ids = query_ids.cpu().long(), gallery_ids.cpu().long()
        if (gallery_ids < JUNK).any():
            raise InputError(f"identity {int(gallery_ids.min())}: the least is {JUNK}, for junk")
        self.query_cameras, self.gallery_cameras = query_cameras.cpu(), gallery_cameras.cpu()
        self.junk = (gallery_ids == JUNK).nonzero()[:, 0]
        self.by_id = torch.argsort(gallery_ids, stable=True)[len(self.junk) :]
        self.start, self.size = _runs(gallery_ids[self.by_id], ids)
        # of the query's camera: runs of identity and camera together
        cameras, camera = torch.cat([self.query_cameras, self.gallery_cameras]).unique(
            return_inverse=True
        )
        # identities numbered from 0: the product with theirs could be beyond 64 bits
        number = torch.cat([ids, gallery_ids]).unique(return_inverse=True)[1]
        places = number * len(cameras) + camera
        _, left_out = _runs(places[len(ids) :][self.by_id].sort().values, places[: len(ids)])
        # Queries are sorted by their number of matches, since a block is padded to its largest.
        matches, queries = (self.size - left_out).sort(stable=True)
        self.counted = queries[matches > 0]
        # pairs of a counted query and an image of another identity
        others = len(gallery_ids) - len(self.junk) - self.size[self.counted]
        self.impostors = int(others.sum())

    def of(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row of the block, gallery image, whether a match), all (P,), in the order of rows."""
        size = self.size[queries]
        row = torch.arange(len(queries)).repeat_interleave(size)
        place = torch.arange(len(row)) - (size.cumsum(0) - size)[row]
        image = self.by_id[self.start[queries][row] + place]
        match = self.gallery_cameras[image] != self.query_cameras[queries][row]
        return row, image, match


def _runs(in_order: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of each key starts in sorted values, and how long it is."""
    start = torch.searchsorted(in_order, keys.contiguous())
    return start, torch.searchsorted(in_order, keys.contiguous(), right=True) - start


def _take_matches(d: Tensor, row: Tensor, image: Tensor, match: Tensor, junk: Tensor) -> Tensor:
    """The distances (P,) of the matches in d (B, G), where those to other identities are left, and
    NaN, which compares false with all, in place of the queries' own identities and of junk."""
    d.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    row, image, match = (x.to(d.device) for x in (row, image, match))
    near = d[row[match], image[match]]
    d[row, image] = torch.nan
    d[:, junk.to(d.device)] = torch.nan
    return near


def _query_scores(d: Tensor, near: Tensor, row: Tensor, image: Tensor, ties: str) -> Tensor:
    """(3, B) in float64: average precision, inverse negative penalty, rank of the first match.

    d (B, G): the distances to other identities. near (P,): those to the matches, each with its row
    of the block and its gallery image, in the order of rows, which have more and more of them."""
    B, G = d.shape
    matches = torch.bincount(row, minlength=B)  # (B,)
    nth = (torch.arange(len(row)) - (matches.cumsum(0) - matches)[row]).to(d.device)
    at = row.to(d.device)
    limit = d.new_full((B, int(matches.max())), torch.inf)  # (B, M), padded
    limit[at, nth] = near
    limit, order = limit.sort(dim=1, stable=True)  # equal ones stay in the gallery's order
    place = None
    if ties == "given":
        place = torch.full_like(order, G)
        place[at, nth] = image.to(d.device)
        place = place.gather(1, order)
    others = _count_before(d, limit, place, matches)

    M = matches.to(d.device)[:, None]
    nth = torch.arange(1, limit.shape[1] + 1, device=d.device)  # (M,): of the query's matches
    rank = (others + nth).double()
    precision = torch.where(nth <= M, nth / rank, 0).sum(dim=1) / M[:, 0]
    last = rank.gather(1, M - 1)
    return torch.stack([precision, (M / last)[:, 0], rank[:, 0]])


def _count_before(d: Tensor, limit: Tensor, place: Tensor | None, matches: Tensor) -> Tensor:
    """How many of a row's distances (B, G) are at most each limit (B, M): (B, M) int64. With
    `place` (B, M), the limits' columns, those that are equal count only to the left of it. Only the
    first `matches` limits of a row, increasing over the rows, are looked at.

    The comparisons are written as floats: their sum is vectorised, that of bytes is not (5 times
    slower on a CPU). A piece adds up to 2**24 at most, so the sums are exact.
    """
    (B, G), M = d.shape, limit.shape[1]
    most = max(M, COMPARISONS["cuda" if d.is_cuda else "cpu"])
    counts = torch.zeros_like(limit, dtype=torch.int64)
    buffer = torch.empty(most, device=d.device)
    width = min(G, most // M)
    if place is not None:
        width = min(width, NARROW)
        less = limit.nextafter(limit.new_tensor(-torch.inf))  # d <= less: d < limit
        less = torch.where(limit == -torch.inf, torch.nan, less)  # nothing is below that
    for rows in torch.arange(B).split(max(1, most // (M * width))):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        m = int(matches[stop - 1])
        for at in range(0, G, width):
            piece = d[start:stop, None, at : at + width]
            largest = limit[start:stop, :m, None]
            if place is not None:  # equal ones count in the pieces left of the one with the match
                left = place[start:stop, :m, None] >= at + piece.shape[2]
                largest = torch.where(left, largest, less[start:stop, :m, None])
            below = buffer[: (stop - start) * m * piece.shape[2]].view(stop - start, m, -1)
            torch.le(piece, largest, out=below)
            counts[start:stop, :m] += below.sum(dim=2).long()
    if place is not None:
        _add_equal_within(counts, d, limit, place, matches, width)
    return counts


def _add_equal_within(
    counts: Tensor, d: Tensor, limit: Tensor, place: Tensor, matches: Tensor, width: int
) -> None:
    """Adds to counts (B, M) the distances that equal a limit, left of its place, within the piece
    of `width` columns that this place is in."""
    nth = torch.arange(limit.shape[1], device=d.device)
    row, column = (nth < matches.to(d.device)[:, None]).nonzero(as_tuple=True)
    offset = torch.arange(width, device=d.device)
    for part in torch.arange(len(row), device=d.device).split(max(1, NEARBY // width)):
        r, c = row[part], column[part]
        last = place[r, c, None]
        at = torch.div(last, width, rounding_mode="floor") * width + offset  # (P, width)
        equal = d[r[:, None], at.clamp(max=d.shape[1] - 1)] == limit[r, c, None]
        counts[r, c] += (equal & (at < last)).sum(dim=1)


def check_ties(ties: str) -> None:
    """Raises InputError where this is no rule for equal distances."""
    if ties not in TIES:
        raise InputError(f"unknown ties {ties!r}: give one of {', '.join(TIES)}")


def _check_ids(*tensors: Tensor) -> tuple[int, int]:
    query_ids, gallery_ids, query_cameras, gallery_cameras = tensors
    for x in tensors:
        if x.ndim != 1 or x.is_floating_point():
            raise InputError(
                f"identities or cameras {tuple(x.shape)} of {x.dtype}: give one integer an image"
            )
    if len(query_ids) != len(query_cameras) or len(gallery_ids) != len(gallery_cameras):
        raise InputError(
            f"{len(query_ids)} query identities with {len(query_cameras)} cameras, "
            f"{len(gallery_ids)} gallery identities with {len(gallery_cameras)} cameras"
        )
    if not len(query_ids) or not len(gallery_ids):
        raise InputError(f"{len(query_ids)} queries against {len(gallery_ids)} gallery images")
    return len(query_ids), len(gallery_ids)
