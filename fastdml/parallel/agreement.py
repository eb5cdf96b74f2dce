"""What all ranks decide at the same step, though each learns of it at another time: to stop after a
signal, to save.

Each step every rank says what it wants, as bits of a number. These are joined by an all-reduce on a
CPU group, which goes on beside the next steps and is read two steps later: no step waits for it,
and all ranks read the same answer at the same step.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh

BITS = 8


class Agreement:
    """Flags that any rank raises, and all read at the same step."""

    LAG = 2  # steps between a question and its answer

    def __init__(self, mesh: Mesh) -> None:
        self.group = mesh.control
        self.flying: deque[tuple[Tensor, Any]] = deque()
        self.settled = 0  # flags that the next answers no longer raise
        self.left = 0  # how many answers those are

    def ask(self, flags: int) -> int:
        """Call once a step, on every rank: the flags that any rank raised `LAG` calls ago."""
        self._send(flags)
        return self._next() if len(self.flying) > self.LAG else 0

    def settle(self, flags: int) -> int:
        """Call on every rank: the flags that any rank has raised up to now, here or in questions
        that were not answered yet. Waits for all ranks."""
        self._send(flags)
        found = 0
        while self.flying:
            found |= self._next()
        return found

    def done(self, flags: int) -> None:
        """Call on every rank once what these flags asked for is done: they are not raised again by
        questions from before."""
        self.settled, self.left = flags, len(self.flying)

    def _send(self, flags: int) -> None:
        if not 0 <= flags < 1 << BITS:
            raise ValueError(f"flags must be within 0..{(1 << BITS) - 1}, not {flags}")
        # a byte a flag, so that the greatest of each is that any rank has raised it
        bits = torch.tensor([flags >> i & 1 for i in range(BITS)], dtype=torch.uint8)
        work = dist.all_reduce(bits, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.flying.append((bits, work))

    def _next(self) -> int:
        bits, work = self.flying.popleft()
        work.wait()
        found = sum(int(bit) << i for i, bit in enumerate(bits.tolist()))
        if self.left:
            self.left -= 1
            found &= ~self.settled
        return found
