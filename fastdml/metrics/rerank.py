"""Re-ranking by k-reciprocal neighbours, in memory bounded by a block and by the neighbours.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. With
N = Q + G images of D features, the usual code holds several N x N matrices. Here:
- Neighbours: half of the symmetric distance matrix, `block` numbers at a time, leaves each image
  its k1 + 1 nearest and its farthest distance: N**2 D multiply-adds, which is most of the time.
- Encodings, N x N in the paper, are kept as the few dozen entries a row that are not zero.
- Jaccard distances come from lists of the gallery images that share an entry with a query.
Beyond the features, a copy of them and the result (Q, G): some blocks of 4 or 8 bytes a number,
12 (k1 + 1) N bytes of neighbours and 20 bytes an entry of the encodings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdml.errors import InputError
from fastdml.metrics.distances import check_metric, check_squares

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 22  # numbers held at once, of each of a handful of tensors
LEAST = 1e-30  # instead of a division by zero where all images are alike


@torch.no_grad()
def k_reciprocal_rerank(
    query_features: Tensor,
    gallery_features: Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    metric: str = "euclidean",
    block: int = BLOCK,
) -> Tensor:
    """Distances (Q, G) in float32, within [0, 1], of features (Q, D) and (G, D).

    As in the authors' code: d(i, j) is the squared Euclidean distance over the largest that image
    i has to any image; R(i, k) are the k + 1 nearest images of i (i among them) that have i among
    their own k + 1 nearest; R*(i) is R(i, k1) together with each R(j, k1 / 2), j in R(i, k1), of
    which more than two thirds lie in R(i, k1); V_i holds exp(-d(i, j)) for j in R*(i), summing to
    one, and is then averaged over the k2 nearest images of i (i among them; k2 = 1: not at all).
    The result is (1 - lambda_value) Jaccard(V_q, V_g) + lambda_value d(q, g), where the Jaccard
    distance is 1 - sum min / sum max.

    Features are compared as they come, in float32. With metric "cosine" 1 - cosine takes the place
    of the Euclidean distance, and is squared as that is: what the authors' code makes of matrices
    of cosine distances. The Euclidean distance of normalised features, squared, is 2 (1 - cosine).
    An image's nearest is itself; of others at equal distance any may be taken for nearer.
    Raises InputError on wrong shapes and settings, and where a feature or its square is not finite.
    """
    _check_settings(k1, k2, lambda_value, block)
    _check_features(query_features, gallery_features)
    check_metric(metric)
    x = torch.cat([query_features.float(), gallery_features.float()])  # (N, D): queries first
    Q, G = len(query_features), len(gallery_features)
    with torch.autocast(x.device.type, enabled=False):
        return _rerank(_OfFeatures(x, metric), Q, G, k1, k2, lambda_value, block)


@torch.no_grad()
def rerank_distances(
    q_g_dist: Tensor | np.ndarray,
    q_q_dist: Tensor | np.ndarray,
    g_g_dist: Tensor | np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    block: int = BLOCK,
) -> Tensor:
    """As `k_reciprocal_rerank`, from distances between queries and gallery (Q, G), between queries
    (Q, Q) and within the gallery (G, G), which are squared first: the arguments and the result of
    the function `re_ranking` of the authors' code, torchreid and fast-reid. In float64 where one of
    them is, else in float32.

    Of matrices that are not symmetric the columns count, as there. Raises InputError on wrong
    shapes and settings, and where a distance or its square is not finite.
    """
    _check_settings(k1, k2, lambda_value, block)
    given = _Given(*(torch.as_tensor(x) for x in (q_g_dist, q_q_dist, g_g_dist)))
    Q, G = given.between.shape
    return _rerank(given, Q, G, k1, k2, lambda_value, block)


def _rerank(
    source: _OfFeatures | _Given, Q: int, G: int, k1: int, k2: int, lambda_value: float, block: int
) -> Tensor:
    k1, k2 = min(k1, Q + G - 1), min(k2, Q + G)
    near, farthest, result = _neighbours(source, Q, G, max(k1 + 1, k2), block)
    if not farthest.isfinite().all():
        raise InputError(
            f"distances too large for {farthest.dtype}, in which they are squared: divide them, or "
            "the features, by a number"
        )
    encoding = _encode(source, near[:, : k1 + 1], farthest, k1, block)
    if k2 > 1:
        encoding = _average(encoding, near[:, :k2], block)
    result.mul_(lambda_value / farthest[:Q, None]).add_(1 - lambda_value)
    for rows, shared in _shared(encoding, Q, G, block):  # shared: sum of min; sum of max: 2 - it
        result[rows] -= shared.div_(2 - shared).mul_(1 - lambda_value)
    return result.clamp_(0, 1)


class Encoding(NamedTuple):
    """A sparse (N, N) matrix by its entries that are not zero, in the order of rows and columns."""

    row: Tensor  # (E,) int64
    column: Tensor  # (E,) int64
    value: Tensor  # (E,) float32


def _check_settings(k1: int, k2: int, weight: float, block: int) -> None:
    if min(k1, k2, block) < 1 or not 0 <= weight <= 1:
        raise InputError(
            f"k1={k1}, k2={k2}, block={block}, lambda_value={weight}: the first three must be at "
            "least 1, and lambda_value within 0 and 1"
        )


def _check_features(query: Tensor, gallery: Tensor) -> None:
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise InputError(
            f"features {tuple(query.shape)} and {tuple(gallery.shape)}: give (Q, D) and (G, D)"
        )
    if not len(query) or not len(gallery):
        raise InputError(f"{len(query)} queries against {len(gallery)} gallery images")
    for name, x in (("query", query), ("gallery", gallery)):
        check_squares(x, name, torch.float32, "nothing to rank")


class _OfFeatures:
    """Squared distances between features (N, D), queries first."""

    def __init__(self, x: Tensor, metric: str) -> None:
        self.cosine = metric == "cosine"
        self.x = F.normalize(x, dim=1) if self.cosine else x
        self.like = x  # of the dtype and on the device of the distances
        # (N,), a few rows at a time: no second copy of the features
        self.square = torch.cat([part.square().sum(dim=1) for part in self.x.split(4096)])

    def tiles(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Distances (R, C) of some images to others, and (C, R) back, which may be a view."""
        if self.cosine:
            d = (self.x[rows] @ self.x[columns].T).sub_(1).square_()
        else:
            d = torch.addmm(self.square[columns], self.x[rows], self.x[columns].T, alpha=-2)
            d.add_(self.square[rows, None]).clamp_(min=0)
        return d, d.T

    def pairs(self, row: Tensor, column: Tensor) -> Tensor:
        """(E,): distances of pairs in the order of rows."""
        x, N = self.x, len(self.x)
        start = torch.searchsorted(row, torch.arange(N + 1, device=x.device))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse")  # beta, and unchecked unless told otherwise
            pairs = torch.sparse_csr_tensor(
                start, column, x.new_zeros(len(row)), (N, N), check_invariants=False
            )
            # ten times faster than gathering both features of each pair
            product = torch.sparse.sampled_addmm(pairs, x, x.T, beta=0).values()
        if self.cosine:
            return (1 - product).square_()
        return (self.square[row] + self.square[column] - 2 * product).clamp_(min=0)


class _Given:
    """Squared distances from given matrices. Of image i to j it is that in row j and column i of
    the whole matrix, which none but the authors' code makes."""

    def __init__(self, between: Tensor, queries: Tensor, gallery: Tensor) -> None:
        shapes = [tuple(x.shape) for x in (between, queries, gallery)]
        Q, G = shapes[0] if between.ndim == 2 else (0, 0)
        if not Q or not G or shapes[1:] != [(Q, Q), (G, G)]:
            raise InputError(
                f"distances {shapes[0]}, {shapes[1]} and {shapes[2]}: give (Q, G) between queries "
                "and gallery, (Q, Q) between queries and (G, G) within the gallery"
            )
        for name, x in (("Q, G", between), ("Q, Q", queries), ("G, G", gallery)):
            if bad := sum(int((~part.isfinite()).sum()) for part in x.split(max(1, BLOCK // G))):
                raise InputError(f"{bad} of the distances ({name}) are not finite")
        self.between, self.queries, self.gallery, self.Q = between, queries, gallery, Q
        exact = torch.float64 in (between.dtype, queries.dtype, gallery.dtype)
        self.like = between.new_empty(0, dtype=torch.float64 if exact else torch.float32)

    def tiles(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Distances (R, C) of some images to others, and (C, R) back."""
        return self._tile(rows, columns), self._tile(columns, rows)

    def _tile(self, rows: slice, columns: slice) -> Tensor:
        (asked, found), (asked_too, found_too) = self._parts(rows), self._parts(columns)
        nearer = torch.cat(
            [self.queries[asked_too, asked].T, self.between[asked, found_too]], dim=1
        )
        farther = torch.cat(
            [self.between[asked_too, found].T, self.gallery[found_too, found].T], dim=1
        )
        return torch.cat([nearer, farther]).to(self.like).square_()

    def _parts(self, images: slice) -> tuple[slice, slice]:
        """The queries and the gallery images among them."""
        first, last = images.start, images.stop
        return (
            slice(min(first, self.Q), min(last, self.Q)),
            slice(max(first - self.Q, 0), max(last - self.Q, 0)),
        )

    def pairs(self, row: Tensor, column: Tensor) -> Tensor:
        """(E,): distances of pairs in the order of rows."""
        found = self.like.new_empty(len(row))
        i, j = row - self.Q, column - self.Q
        for own, other, matrix, at in (
            (i < 0, j < 0, self.queries, (column, row)),
            (i < 0, j >= 0, self.between, (row, j)),
            (i >= 0, j < 0, self.between, (column, i)),
            (i >= 0, j >= 0, self.gallery, (j, i)),
        ):
            these = own & other
            found[these] = matrix[at[0][these], at[1][these]].to(found)
        return found.square_()


def _neighbours(
    source: _OfFeatures | _Given, Q: int, G: int, k: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest images of each, itself first (N, k); the distance of its farthest (N,); and
    the distances of queries and gallery (Q, G). All distances are squared.

    Only square tiles from the diagonal on are computed: a tile tells its rows about its columns
    and, transposed, its columns about its rows.
    """
    N, like = Q + G, source.like
    nearest = like.new_full((N, k), torch.inf)  # the smallest distances so far
    near = torch.zeros(N, k, dtype=torch.int64, device=like.device)
    farthest = like.new_full((N,), LEAST)
    result = like.new_empty(Q, G)

    def learn(images: slice, d: Tensor, first: int) -> None:
        """Merges the distances d of `images` to the images from `first` on into `nearest`, `near`
        and `farthest`."""
        found, which = d.topk(min(k, d.shape[1]), dim=1, largest=False)
        found = torch.cat([nearest[images], found], dim=1)
        which = torch.cat([near[images], which + first], dim=1)
        nearest[images], place = found.topk(k, dim=1, largest=False)
        near[images] = which.gather(1, place)
        farthest[images] = torch.maximum(farthest[images], d.amax(dim=1))

    side = math.isqrt(block)
    tiles = [slice(at, min(at + side, N)) for at in range(0, N, side)]
    for rows, columns in combinations_with_replacement(tiles, 2):
        d, back = source.tiles(rows, columns)
        if rows.start < Q < columns.stop:
            asked = d[: min(rows.stop, Q) - rows.start, max(Q - columns.start, 0) :]
            result[rows, max(columns.start - Q, 0) : columns.stop - Q] = asked
        if rows == columns:
            d.fill_diagonal_(-1)  # an image is its own nearest, whatever rounding makes of it
        else:
            learn(columns, back.contiguous(), rows.start)
        learn(rows, d, columns.start)
    return near, farthest, result


def _reciprocal(near: Tensor, block: int) -> Tensor:
    """(N, k): whether image i is among the k nearest of near[i, c], itself among those of i."""
    N, k = near.shape
    parts = torch.arange(N, device=near.device).split(max(1, block // k**2))
    return torch.cat([(near[near[i]] == i[:, None, None]).any(dim=2) for i in parts])


def _encode(
    source: _OfFeatures | _Given, near: Tensor, farthest: Tensor, k1: int, block: int
) -> Encoding:
    """V, before it is averaged."""
    N, k = near.shape
    half = near[:, : round(k1 / 2) + 1]
    mutual, mutual_half = _reciprocal(near, block), _reciprocal(half, block)
    rows, columns = [], []
    for i in torch.arange(N, device=near.device).split(max(1, block // (k * k * half.shape[1]))):
        own = torch.where(mutual[i], near[i], -1)  # (B, k): R(i, k1), padded
        candidates, counted = half[near[i]], mutual_half[near[i]]  # (B, k, h): R(j, k1 / 2)
        inside = (candidates[..., None] == own[:, None, None]).any(dim=3) & counted
        joins = 3 * inside.sum(dim=2) > 2 * counted.sum(dim=2)  # (B, k)
        joins = (joins & mutual[i])[..., None] & counted
        members = torch.where(joins, candidates, -1).flatten(1)
        members = torch.cat([own, members], dim=1).sort(dim=1).values
        first = members.diff(dim=1, prepend=members.new_full((len(i), 1), -1)) > 0
        row, place = first.nonzero(as_tuple=True)
        rows.append(i[row])
        columns.append(members[row, place])
    row, column = torch.cat(rows), torch.cat(columns)
    value = torch.exp(-source.pairs(row, column) / farthest[row])
    total = value.new_zeros(N).index_add_(0, row, value)
    return Encoding(row, column, value / total[row])


def _average(encoding: Encoding, near: Tensor, block: int) -> Encoding:
    """The mean of the rows of each image's nearest (N, k2)."""
    N, k2 = near.shape
    _, column, value = encoding
    start, size = _lists(encoding.row, N)
    found = []
    for i in torch.arange(N, device=near.device).split(max(1, block // int(k2 * size.max()))):
        source, entry = _expand(near[i].flatten(), start, size)
        key = torch.div(source, k2, rounding_mode="floor") * N + column[entry]
        key, group = key.unique(return_inverse=True)
        mean = value.new_zeros(len(key)).index_add_(0, group, value[entry] / k2)
        found.append((i[key // N], key % N, mean))
    return Encoding(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _shared(encoding: Encoding, Q: int, G: int, block: int) -> Iterator[tuple[slice, Tensor]]:
    """For a few queries at a time: which, and the sums of min(V_q, V_g), (B, G)."""
    asked = encoding.row < Q
    row, column, value = (part[asked] for part in encoding)
    image, listed, weight = (part[~asked] for part in encoding)
    order = listed.argsort(stable=True)  # the gallery's entries by column
    image, weight = image[order] - Q, weight[order]
    start, size = _lists(listed[order], Q + G)

    first = torch.searchsorted(row, torch.arange(Q + 1, device=row.device)).tolist()
    work = torch.zeros(Q, dtype=torch.int64, device=row.device).index_add_(0, row, size[column])
    for begin, end in _portions(work.tolist(), block, max(1, block // G)):
        entries = slice(first[begin], first[end])
        source, place = _expand(column[entries], start, size)
        least = torch.minimum(value[entries][source], weight[place])
        at = (row[entries][source] - begin) * G + image[place]
        shared = value.new_zeros((end - begin) * G).index_add_(0, at, least)
        yield slice(begin, end), shared.view(end - begin, G)


def _portions(work: list[int], most: int, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of up to `longest` items whose work is `most` or less, or of one item."""
    begin = total = 0
    for i, w in enumerate(work):
        if i > begin and (total + w > most or i - begin == longest):
            yield begin, i
            begin, total = i, 0
        total += w
    yield begin, len(work)


def _lists(sorted_keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where each key's run starts and how long it is, both (count,)."""
    size = torch.bincount(sorted_keys, minlength=count)
    return size.cumsum(0) - size, size


def _expand(keys: Tensor, start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """All members of the runs of `keys`, one after the other: the key's place, the member's."""
    sizes = size[keys]
    source = torch.arange(len(keys), device=keys.device).repeat_interleave(sizes)
    offset = start[keys] - (sizes.cumsum(0) - sizes)
    return source, torch.arange(len(source), device=keys.device) + offset[source]
