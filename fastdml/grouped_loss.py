"""`GroupedLoss`: the mutual loss of peers in equal groups that do not learn from each other.

Each group goes through the kernels by itself, as a cohort of its own would, so that its losses,
statistics and gradients are the same bits, and every option holds within the group. One call with
weights of peers that are 0 between the groups gives the same to rounding only, and not with a gate
that looks for the best of all peers. Losses and gradients of 3 groups at (N, C) = (64, 100) on one
thread of an AMD EPYC: of 2 peers each 105 us, by one call 77; of 4 peers each 166 us, by one call
184.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastdml_kernels.stats_layout import stats_layout
from torch import Tensor
from typing_extensions import Unpack

from fastdml.loss import MutualLoss
from fastdml.loss_options import LossOptions
from fastdml.mutual_stats import MutualStats


class GroupedLoss(MutualLoss):
    """`MutualLoss` of `peers` peers in `groups` equal groups, one after the other, and behind them
    of `teachers` networks that teach every group.

    Of statistics what peers of different groups would say of each other is not computed, and NaN;
    `ensemble_correct` is the mean over the groups. Losses and statistics of the teachers are those
    beside the first group. Options are `MutualLoss`'s, but for those that are matrices over all
    peers: peer_weights and students. Raises ValueError for these.
    """

    fill: Tensor  # (2,): what no group has
    index: Tensor  # where each of all statistics is among those of the groups, and then `fill`

    def __init__(
        self, groups: int, peers: int, teachers: int = 0, **options: Unpack[LossOptions]
    ) -> None:
        for name in ("peer_weights", "students"):
            if options.get(name) is not None:
                raise ValueError(f"{name} go over all peers, and groups are computed one by one")
        super().__init__(**options)
        self.groups, self.size = groups, peers // groups
        self.teachers = teachers
        self.register_buffer("fill", torch.tensor([torch.nan, 0.0]), persistent=False)
        self.register_buffer("index", self._new_index(), persistent=False)

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MutualStats]:
        """As `MutualLoss.forward`."""
        found: list[Any] = [
            MutualLoss.forward(self, part, labels, sample_weight) for part in self.parts(logits)
        ]
        if not self.return_stats:
            return self._of_all(found)
        losses, stats = zip(*found, strict=True)
        return self._of_all(losses), self._statistics(stats)

    def value_and_grad(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, MutualStats, list[Tensor | None]]:
        """As `MutualLoss.value_and_grad`."""
        found = [
            MutualLoss.value_and_grad(self, part, labels, sample_weight)
            for part in self.parts(logits)
        ]
        losses, stats, grads = zip(*found, strict=True)
        joined: list[Tensor | None]
        if isinstance(logits, Tensor):
            joined = [torch.cat([grad for (grad,) in grads])]
        else:
            joined = [grad for own in grads for grad in own[: self.size]] + grads[0][self.size :]
        return self._of_all(losses), self._statistics(stats), joined

    def parts(self, logits: Tensor | Sequence[Tensor]) -> list[Tensor | Sequence[Tensor]]:
        """The logits of each group, the teachers' behind them."""
        n, K = self.size, self.size * self.groups
        if len(logits) != K + self.teachers:
            raise ValueError(
                f"logits of {len(logits)} networks: this loss is of {K} peers and {self.teachers} "
                "teachers"
            )
        starts = range(0, K, n)
        if isinstance(logits, Tensor):
            return [logits[start : start + n] for start in starts]
        return [[*logits[start : start + n], *logits[K:]] for start in starts]

    def _of_all(self, found: Sequence[Tensor]) -> Tensor:
        """A row a peer, then the teachers', from those of each group."""
        return torch.cat([*(own[: self.size] for own in found), found[0][self.size :]])

    def _statistics(self, found: Sequence[MutualStats]) -> MutualStats:
        parts = [stats.packed for stats in found]
        values = torch.cat([*parts, self.fill.to(parts[0].dtype)])
        networks = self.size * self.groups + self.teachers
        stats = MutualStats.from_packed(values[self.index], networks)
        stats.ensemble_correct.copy_(torch.stack([own.ensemble_correct for own in found]).mean())
        return stats

    def _new_index(self) -> Tensor:
        n, G = self.size, self.groups
        K = n * G
        own, all_layout = stats_layout(n + self.teachers), stats_layout(K + self.teachers)
        places = torch.arange(G * own.size).view(G, own.size)
        index = torch.full((all_layout.size,), G * own.size + 1)
        of_all = all_layout.views(index)
        of_all["pairwise_kl"].fill_(G * own.size)
        for g in reversed(range(G)):  # what is of no group is the first's
            of_group = own.views(places[g])
            peers = slice(g * n, (g + 1) * n)
            for name, value in of_group.items():
                whole = of_all[name]
                if value.dim() == 0:
                    whole.copy_(value)
                    continue
                rows = [(peers, slice(n)), (slice(K, None), slice(n, None))]
                for to, source in rows:
                    if value.dim() == 1:
                        whole[to] = value[source]
                        continue
                    for to_column, column in rows:
                        whole[to, to_column] = value[source, column]
        return index
