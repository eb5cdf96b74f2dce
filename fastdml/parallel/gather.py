"""Rows of a batch from all columns of a mesh, for losses that compare images of the whole batch.

Every column computes such a loss of the whole batch, on features that are the same bits everywhere,
and takes its own rows of the gradient: summed over the columns, as replicas sum the gradients of
their weights, that is the whole batch's gradient, without communication in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh


class Rows:
    """Of a batch cut into columns: this column has `rows` of its rows. Made by all ranks at the
    same time, and asks for the others' numbers at once; the first use waits for them, on the host
    alone."""

    def __init__(self, rows: int, mesh: Mesh) -> None:
        self.mesh = mesh
        self._sizes = [rows]  # by column
        self.work: Any = None
        if mesh.data > 1:
            own = torch.tensor([rows])
            self.found = torch.empty(mesh.world, dtype=own.dtype)
            self.work = dist.all_gather(
                list(self.found.split(1)), own, group=mesh.control, async_op=True
            )

    @property
    def sizes(self) -> list[int]:
        """The rows of each column, in the order of the whole batch."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            self._sizes = self.found[: self.mesh.data].tolist()
        return self._sizes

    def gather(self, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """The whole batch's (N, ...) of the columns' shares `t` (rows, ...), without gradient. A
        collective of `group`, one process a column. Shares are sent in the size of the largest."""
        t = t.detach()
        sizes = self.sizes
        if len(sizes) == 1:
            return t
        sent = t.contiguous()
        if len(t) < max(sizes):
            sent = t.new_zeros((max(sizes), *t.shape[1:]))
            sent[: len(t)] = t
        found = t.new_empty((len(sizes), *sent.shape))
        dist.all_gather(list(found.unbind(0)), sent, group=group)
        return torch.cat([share[:n] for share, n in zip(found.unbind(0), sizes, strict=True)])

    def own(self, whole: Tensor) -> Tensor:
        """This column's rows of (N, ...)."""
        start = sum(self.sizes[: self.mesh.column])
        return whole[start : start + self.sizes[self.mesh.column]]
