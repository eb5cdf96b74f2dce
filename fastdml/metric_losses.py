"""Losses on the features of a batch, for re-identification, beside the mutual loss on its logits.

Features are (N, D), labels (N,) identities, N a batch of a few images of each of several identities
(a PK batch). Every loss is a handful of calls on (N, N) matrices without a loop over anchors, never
waits for the device, and can be part of a captured step. Sums are in float32 at least, also under
autocast. An anchor without another image of its identity, or without one of another, has no loss;
a batch where none has one gives 0. Gradients are sums of matrix products in a fixed order: the same
bits from run to run.

A loss with its gradient costs about 4 N**2 D multiply-adds for a peer: 34M at 64 x 2048.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.errors import InputError

ABSENT = 1e30  # in place of infinity, which would make a gradient NaN


def triplet_loss(features: Tensor, labels: Tensor, *, margin: float | None = 0.3) -> Tensor:
    """Batch-hard triplet loss, 0-d: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss", 2017.

    Mean over the anchors of max(0, margin + d_p - d_n), or with margin=None of the soft margin
    log(1 + exp(d_p - d_n)): d_p the Euclidean distance to the furthest other image of the anchor's
    identity, d_n to the nearest of another. Images at equal distance share the gradient.

    features: (N, D), any floating dtype; labels: (N,), integers. Other shapes raise InputError.
    """
    _check([features], labels)
    same, other = _pairs(labels)
    d = distances(features)
    furthest = d.masked_fill(~same, -torch.inf).amax(1)
    nearest = d.masked_fill(~other, torch.inf).amin(1)
    gap = furthest - nearest  # -inf for an anchor without one of them: no loss, no gradient
    each = F.softplus(gap) if margin is None else (gap + margin).relu()
    return each.sum() / (same.any(1) & other.any(1)).sum().clamp(min=1)


def circle_loss(
    features: Tensor, labels: Tensor, *, margin: float = 0.25, gamma: float = 128.0
) -> Tensor:
    """Circle loss on pairs, 0-d: Sun et al., "Circle Loss", 2020, equation 6, mean over anchors.

    log(1 + sum_n exp(gamma a_n (s_n - margin)) sum_p exp(-gamma a_p (s_p - 1 + margin))), s cosine
    similarities, p the other images of the anchor's identity and n those of others, and constants
    a_n = max(0, s_n + margin), a_p = max(0, 1 + margin - s_p).

    features: (N, D), any floating dtype; labels: (N,), integers. Other shapes raise InputError.
    """
    _check([features], labels)
    same, other = _pairs(labels)
    s = _cosines(features)
    a_p, a_n = (1 + margin - s).relu().detach(), (s + margin).relu().detach()
    z_p = (-gamma * a_p * (s - 1 + margin)).masked_fill(~same, -ABSENT)
    z_n = (gamma * a_n * (s - margin)).masked_fill(~other, -ABSENT)
    each = F.softplus(z_p.logsumexp(1) + z_n.logsumexp(1))  # 0 for an anchor without one of them
    return each.sum() / (same.any(1) & other.any(1)).sum().clamp(min=1)


def distance_mutual_loss(features: Sequence[Tensor]) -> Tensor:
    """Mutual learning of the batch's distance matrices, (K,): Zhang et al., "AlignedReID", 2017,
    section 3.3.

    L_k = mean over the other peers l of (1 / N**2) sum_ij (M_k[i, j] - M_l[i, j])**2, M the
    Euclidean distances, M_l a constant. 0 for a single peer.

    features: K tensors (N, D_k), whose widths may differ. Raises InputError for other shapes.
    """
    _check(features)
    m = torch.stack([distances(x) for x in features])  # (K, N, N)
    return _mutual(m, m)


def _mutual(own: Tensor, all: Tensor) -> Tensor:
    """The loss of each of L peers' distances (L, N, N) against those of all K, (K, N, N), -> (L,).
    A peer's own are among them, and 0 away from it."""
    K, N, _ = all.shape
    gaps = own[:, None] - all.detach()  # (L, K, N, N)
    return gaps.square().sum((1, 2, 3)) / (max(K - 1, 1) * N * N)


class CenterLoss(nn.Module):
    """Mean squared distance of the features to a centre each identity has: Wen et al., "A
    Discriminative Feature Learning Approach for Deep Face Recognition", 2016.

    (1 / N) sum_i |x_i - c_i|**2, c_i the centre of image i's identity, as the code of BoT has it
    (the paper has half the sum). In training mode the centres, which start at 0, then follow by the
    paper's equation 4: c_j -= alpha sum (c_j - x_i) / (1 + n_j) over the n_j images of identity j.
    Centres take in no value that is not finite. Features of another width than `dim`, or labels of
    another shape, raise InputError.
    """

    centers: Tensor  # (num_classes, dim)

    def __init__(self, num_classes: int, dim: int, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("centers", torch.zeros(num_classes, dim))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features: (N, D), any floating dtype; labels: (N,) in 0..num_classes-1 -> 0-d."""
        _check([features], labels)
        if features.shape[1] != self.centers.shape[1]:
            raise InputError(
                f"features of shape {tuple(features.shape)}: the centres have "
                f"{self.centers.shape[1]} dimensions"
            )
        x, labels = _precise(features), labels.long()
        c = self.centers[labels]  # (N, D)
        loss = (x - c).square().sum() / len(x)
        if self.training:
            self._follow(x.detach(), labels, c)
        return loss

    @torch.no_grad()
    def _follow(self, x: Tensor, labels: Tensor, c: Tensor) -> None:
        same = (labels[:, None] == labels).to(x.dtype)  # (N, N), an image and itself included
        away = (c - x).to(same.dtype)
        with _no_autocast(x):
            new = c - self.alpha * (same @ away) / (1 + same.sum(1, keepdim=True))
        new = new[same.argmax(1)].to(c.dtype)  # of the first image: one value for each identity
        self.centers.index_copy_(0, labels, torch.where(new.isfinite(), new, c))

    def extra_repr(self) -> str:
        return f"num_classes={len(self.centers)}, dim={self.centers.shape[1]}, alpha={self.alpha}"


class MetricLoss(nn.Module):
    """The weighted sum of these losses, for each of K peers on its own features.

    triplet, center, circle, distance_mutual: weights; a loss of weight 0 is not computed, and one
        must be above 0. They are numbers, so a captured step keeps them as they were at capture.
    margin: of the triplet loss; None for the soft margin.
    num_classes: identities, for the centres.
    dims: D_k of every peer.

    Its state is the peers' centres: buffers, in `state_dict()` and moved by `to(device)`. Raises
    InputError for weights or a margin below 0, and for features of other widths than `dims`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        dims: Sequence[int],
        triplet: float = 0.0,
        margin: float | None = 0.3,
        center: float = 0.0,
        circle: float = 0.0,
        distance_mutual: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {
            "triplet": triplet, "center": center, "circle": circle,
            "distance_mutual": distance_mutual,
        }  # fmt: skip
        for name, weight in weights.items():
            if not weight >= 0:
                raise InputError(f"the weight {name} must be 0 or more, not {weight!r}")
        if not any(weights.values()):
            raise InputError(f"a metric loss needs a weight above 0: {', '.join(weights)}")
        if margin is not None and not margin >= 0:
            raise InputError(f"margin must be 0 or more, or None, not {margin!r}")
        self.weights, self.margin, self.dims = weights, margin, tuple(dims)
        self.centers = nn.ModuleList(CenterLoss(num_classes, d) for d in self.dims if center)

    def forward(
        self,
        features: Sequence[Tensor | None],
        labels: Tensor,
        peers: Iterable[int] | None = None,
        elsewhere: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """features: K tensors (N, D_k), labels: (N,) -> (K,); updates the centres in training mode.

        peers: those to compute; the others' losses are 0, and their centres stay.
        elsewhere: of peers whose features are None, as other processes have them, the `distances`
            (N, N), which `distance_mutual` needs. Such a peer's loss is 0.
        """
        here = {k: x for k, x in enumerate(features) if x is not None}
        _check([*here.values()], labels)
        widths = {k: x.shape[1] for k, x in here.items()}
        if len(features) != len(self.dims) or any(self.dims[k] != d for k, d in widths.items()):
            found = [tuple(x.shape) for x in here.values()]
            raise InputError(f"features of shapes {found}: this loss is for widths {self.dims}")
        w, wanted = self.weights, range(len(features)) if peers is None else {*peers}
        mutual = self._mutual_losses(here, elsewhere or {})
        nothing = _precise(next(iter(here.values())).detach()[:0]).sum()
        losses = []
        for k, x in enumerate(features):
            loss = nothing if x is None else _precise(x[:0]).sum()  # 0, with a gradient
            if x is not None and k in wanted:
                if w["triplet"]:
                    loss = loss + w["triplet"] * triplet_loss(x, labels, margin=self.margin)
                if w["circle"]:
                    loss = loss + w["circle"] * circle_loss(x, labels)
                if w["center"]:
                    loss = loss + w["center"] * self.centers[k](x, labels)
                if mutual:
                    loss = loss + w["distance_mutual"] * mutual[k]
            losses.append(loss)
        return torch.stack(losses)

    def _mutual_losses(
        self, here: Mapping[int, Tensor], elsewhere: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """The loss of the peers that are here against all; none where it is not wanted."""
        if not self.weights["distance_mutual"]:
            return {}
        own = {k: distances(x) for k, x in here.items()}
        everyone = own | dict(elsewhere)
        all = torch.stack([everyone[k] for k in sorted(everyone)])
        some = torch.stack([*own.values()]) if elsewhere else all
        return dict(zip(own, _mutual(some, all), strict=True))

    def value_and_grad(
        self,
        features: Sequence[Tensor | None],
        labels: Tensor,
        peers: Iterable[int] | None = None,
        elsewhere: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Losses (K,) and the gradient of their sum with respect to the features, K tensors
        (N, D_k) in their dtypes, None where there are none. Arguments and effect as of
        `forward`."""
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in features]
            losses = self(leaves, labels, peers, elsewhere)
            grads = iter(torch.autograd.grad(losses.sum(), [x for x in leaves if x is not None]))
        return losses.detach(), [None if x is None else next(grads) for x in leaves]

    def tensors(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return list(self.buffers())

    def extra_repr(self) -> str:
        used = ", ".join(f"{name}={weight}" for name, weight in self.weights.items() if weight)
        return f"{used}, margin={self.margin}, dims={self.dims}"


def _check(features: Sequence[Tensor], labels: Tensor | None = None) -> None:
    shapes = [tuple(x.shape) for x in features]
    if not shapes or any(len(s) != 2 or 0 in s or s[0] != shapes[0][0] for s in shapes):
        raise InputError(f"features of shapes {shapes}: give each as (N, D), of the same N images")
    if labels is not None and (labels.shape != shapes[0][:1] or labels.is_floating_point()):
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and {labels.dtype}: give {shapes[0][:1]} "
            "integers"
        )


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _products(x: Tensor) -> Tensor:
    """(N, D) -> (N, N) inner products in the dtype of x."""
    with _no_autocast(x):
        return x @ x.T


def distances(x: Tensor) -> Tensor:
    """(N, D) -> (N, N) Euclidean distances from inner products. A square below what rounding
    leaves counts as 0, where the gradient is 0 too: an image and itself, and equal images."""
    x = _precise(x)
    x = x - x.detach().mean(0)  # distances stay, and less of them is lost to rounding
    products = _products(x)
    squares = products.diagonal()
    sums = squares[:, None] + squares
    d = sums - 2 * products
    equal = d <= 4 * torch.finfo(d.dtype).eps * sums  # False for NaN, which stays visible
    return d.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)


def _cosines(x: Tensor) -> Tensor:
    """(N, D) -> (N, N) cosine similarities; a row of zeros is similar to none, without gradient."""
    products = _products(_precise(x))
    squares = products.diagonal()
    zero = squares == 0
    scale = squares.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    return products * scale[:, None] * scale


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) masks: the other images of the row's identity, and those of other identities."""
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same
