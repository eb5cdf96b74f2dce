"""Teachers of which the predictions are given, not the layers: logits, or the k likeliest classes.

Cached ones may lie in the host's memory or in a mapped file while the rest is on a device: a chunk
of rows is brought there at a time. Of top-k log-probabilities no (N, C) tensor ever exists either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Gate

# The logit of a class of probability 0. A finite one, of which exp is 0 all the same, is left to
# the CPU's native code, which -inf is not; only a gate that weighs a teacher by the probability of
# the label tells the two apart.
ABSENT = -1e30


class GivenTeachers(NamedTuple):
    """They stand after the peers that have layers, those of `logits` first."""

    logits: Sequence[Tensor] = ()  # T tensors (N, C), on the device or in the host's memory
    log_probs: Tensor | None = None  # (N, k), floating
    indices: Tensor | None = None  # (N, k), int64 or int32, different within a row

    @property
    def number(self) -> int:
        return len(self.logits) + (self.log_probs is not None)

    def tensors(self) -> list[Tensor]:
        return [*self.logits, *(t for t in (self.log_probs, self.indices) if t is not None)]

    def row_bytes(self, C: int) -> int:
        """Of one row of all their logits on the device."""
        sizes = [z.element_size() for z in self.logits]
        return C * (sum(sizes) + (0 if self.log_probs is None else 4))

    def chunk(
        self, rows: slice, C: int, device: torch.device, dtype: torch.dtype, gate: Gate
    ) -> list[Tensor]:
        """Their logits of some rows, (n, C) each, on the device; of top-k ones in `dtype`. The host
        waits for a copy from its own memory, unless that is pinned."""
        given = [t[rows].to(device, non_blocking=True) for t in self.tensors()]
        if self.log_probs is None:
            return given
        *logits, log_probs, indices = given
        absent = -torch.inf if gate == "confidence" else ABSENT
        return [*logits, _spread(log_probs.to(dtype), indices.long(), C, absent)]

    def check_indices(self, C: int) -> None:
        """Raises ValueError for a class that is none of C, where looking costs no wait."""
        if self.indices is None or self.indices.is_cuda or not self.indices.numel():
            return
        low, high = torch.stack(torch.aminmax(self.indices)).tolist()
        if low < 0 or high >= C:
            raise ValueError(
                f"teacher_topk's indices hold {low if low < 0 else high}, which is no class of "
                f"layers with C = {C}: give classes in 0..{C - 1}"
            )


NO_TEACHERS = GivenTeachers()


def _spread(log_probs: Tensor, indices: Tensor, C: int, absent: float) -> Tensor:
    """Logits (n, C) that are `absent` but at `indices` (n, k): their softmax is that of the k
    alone. A row with an index that is no class is NaN."""
    known = (indices >= 0) & (indices < C)
    nan = log_probs.new_full((), torch.nan)
    rest = torch.where(known.all(1, keepdim=True), absent, nan)
    logits = rest.to(log_probs.dtype).expand(-1, C).contiguous()
    return logits.scatter_(1, indices.clamp(0, C - 1), log_probs)
