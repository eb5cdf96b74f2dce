"""What a compiled kernel does for a row: passes over it, instructions, barriers, waits for memory.

Logits and gradients are the only tensors accessed with an eviction policy, which the instructions
carry (`LDG.E.EF.64`), so that they can be told from labels and sums; copies to shared memory
(`LDGSTS`) are of logits alone. The augmentation's images are all that it loads byte by byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .machine_code import Accesses, Instruction, Loop, Path, loops, memory_waits


def logits_moved(step: Instruction) -> tuple[int, int]:
    """Bytes of logits that a thread reads, and of gradients that it writes. For AMD's GPUs all of
    global memory counts: instructions there do not show the policy."""
    if step.name == "LDGSTS" or step.name.startswith(("global_load", "buffer_load")):
        return step.width, 0
    if step.name.startswith(("global_store", "buffer_store")):
        return 0, step.width
    if not {"EF", "EL"}.intersection(step.modifiers):
        return 0, 0
    return {"LDG": (step.width, 0), "STG": (0, step.width)}.get(step.name, (0, 0))


def pixels_moved(step: Instruction) -> tuple[int, int]:
    """The same for an image's bytes and a batch's values."""
    if step.opcode.startswith(("LDG.E.U8", "global_load_ubyte", "buffer_load_ubyte")):
        return step.width, 0
    return 0, step.width if step.name.startswith(("STG", "global_store", "buffer_store")) else 0


@dataclass(frozen=True)
class RowCost:
    """What a program does for a block of rows, on the code's usual path. A way of moving bytes is
    0 for reads and 1 for writes."""

    path: Path
    accesses: Accesses
    threads: int
    block_bytes: tuple[int, int]  # by way: all logits of a block of classes, all its gradients
    class_blocks: int = 1

    def _moved(self, steps: Iterable[Instruction], way: int) -> int:
        """Bytes that all threads move."""
        return sum(self.accesses(step)[way] for step in steps) * self.threads

    def _blocks(self, loop: Path) -> int:
        """Blocks of classes that a loop takes in a turn: more than one where it is unrolled."""
        return max(1, self._moved(loop.flat(), 0) // self.block_bytes[0])

    def turns(self, loop: Path) -> int:
        """How often an inner loop turns: until it has read the row, where it reads any."""
        read = self._moved(loop.flat(), 0)
        return math.ceil(self.class_blocks / self._blocks(loop)) if read else 1

    def passes(self, way: int) -> int:
        """How often a logit is read or a gradient written. Reads before a loop that reads are those
        of its first turns, which it then leaves out."""
        loops = [loop for loop in self.path.inner if self._moved(loop.flat(), way)]
        if not loops:
            return math.ceil(self._moved(self.path.own, way) / self.block_bytes[way])
        return sum(
            math.ceil(self._moved(loop.flat(), way) / self.block_bytes[way] / self._blocks(loop))
            for loop in loops
        )

    def widths(self, way: int) -> dict[int, int]:
        """How many instructions there are for each number of bytes that a thread moves by one."""
        steps = [step for loop in self.path.inner for step in loop.flat()]
        inner = [step.width for step in steps if self.accesses(step)[way]]
        own = [step.width for step in self.path.own if self.accesses(step)[way]]
        return dict(sorted(Counter(inner or own).items()))

    def total(self, amount: Callable[[Instruction], float]) -> float:
        """The sum of `amount` over all instructions that run."""
        return self.path.total(amount, self.turns)

    def waits(self) -> tuple[float, float]:
        """How often a program waits for device memory, and for the L2 cache: from there come the
        reads of all loops over the classes but the first."""
        reading = [loop for loop in self.path.inner if self._moved(loop.flat(), 0)]
        cached = sum(self.turns(loop) * memory_waits(loop, self.turns) for loop in reading[1:])
        return memory_waits(self.path, self.turns) - cached, cached


def row_loop(code: Sequence[Instruction], accesses: Accesses) -> Loop:
    """The largest loop among those that read logits, or among all that load."""
    reading = [loop for loop in loops(code) if any(accesses(code[i])[0] for i in loop.body)]
    return max(reading, key=lambda loop: len(loop.body))


def issued(step: Instruction) -> int:
    """On AMD's GPUs scalar instructions start beside those of vectors, which alone are counted."""
    return int(step.name.isupper() or step.name.startswith("v_"))
