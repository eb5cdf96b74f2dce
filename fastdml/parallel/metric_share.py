"""A metric loss on a mesh. It compares the images of the whole batch: the columns gather features,
and what peers learn from each other's distances travels as N x N distances, not as features.

Every column computes the losses of the whole batch, and takes the gradient of its own rows: added
over the columns, as all gradients are, they are the whole's, and no reduction runs in the backward
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdml.metric_losses import MetricLoss, distances
from fastdml.parallel.exchange import Exchange, Kind, Transfer
from fastdml.parallel.gather import Rows

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh


class MetricShare:
    """`metric` for the local peers of one step. Made before the forward passes, of a share of
    `rows` rows; `post` when they are done, then `value_and_grad`."""

    def __init__(self, metric: MetricLoss, mesh: Mesh, exchange: Exchange, rows: int) -> None:
        self.metric, self.mesh, self.exchange = metric, mesh, exchange
        self.rows = Rows(rows, mesh)
        self.transfer: Transfer | None = None

    def post(
        self, features: Mapping[int, Tensor], labels: Tensor, dtypes: Mapping[int, torch.dtype]
    ) -> None:
        """Takes the features (n, D_k) of local peers, or also of copies of others, and sends the
        distances of local ones where others wait for them. dtypes: of the peers' features."""
        group = self.mesh.data_group
        self.features = {k: self.rows.gather(x, group) for k, x in features.items()}
        self.labels = self.rows.gather(labels, group)
        if not self.metric.weights["distance_mutual"] or len(features) == len(self.mesh.rows):
            return
        n = len(self.labels)
        kinds = {
            k: Kind((n, n), torch.promote_types(dtypes[k], torch.float32))
            for k in self.exchange.remote
        }
        self.transfer = self.exchange.begin(kinds)
        for k, x in self.features.items():
            self.transfer.give(k, distances(x))

    def value_and_grad(self) -> tuple[Tensor, dict[int, Tensor]]:
        """The losses (K,), of column 0 those of the whole batch and of the others 0, so that they
        add up; and the gradients (n, D_k) of the local peers' features."""
        elsewhere = {} if self.transfer is None else self.transfer.wait()
        features = [self.features.get(k) for k in range(len(self.mesh.rows))]
        local = self.mesh.local
        losses, grads = self.metric.value_and_grad(features, self.labels, local, elsewhere)
        if self.mesh.column:
            losses = torch.zeros_like(losses)
        own: dict[int, Tensor] = {}
        for k in local:
            grad = grads[k]
            assert grad is not None
            own[k] = self.rows.own(grad)
        return losses, own
