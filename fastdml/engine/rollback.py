"""Keeps what a training step changes, and restores it bit for bit.

    Snapshot   everything, so that the real steps of warm-up and measurement leave no trace
    BeforePass buffers and torch's generator, cheap enough for every step: a step that is refused
               halfway leaves no trace
    Buffers    which tensors a module's buffers are, not their values, since a step may put new
               tensors there

Tensors are restored in place, so that a captured graph or an optimizer goes on using them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.absent_tensors import local_part
from fastdml.engine.weights import same
from fastdml.torch_private import buffer_table, foreach_copy_


class Buffers:
    """The buffers below a module as objects: a step may put new tensors in their places."""

    def __init__(self, root: nn.Module) -> None:
        tables = [buffer_table(m) for m in root.modules()]
        self.tables = [(table, dict(table)) for table in tables if table]

    def replaced(self) -> bool:
        return any(not same([*now.values()], [*was.values()]) for now, was in self.tables)

    def put_back(self) -> None:
        for now, was in self.tables:
            now.update(was)


class BeforePass:
    """Buffers and torch's generator as they were before a pass. Cheap enough for every step: 17 us
    for two resnet8 with 42 buffers, 54 us for two resnet32 with 186 (one thread of an AMD EPYC)."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for t in buffers:
            kinds.setdefault(t.dtype, []).append(t.detach())
        self.pairs = [(own, [torch.empty_like(t) for t in own]) for own in kinds.values()]

    def keep(self) -> None:
        self.generator = torch.get_rng_state()
        for own, kept in self.pairs:
            foreach_copy_(kept, own)

    def drew(self) -> bool:
        return not torch.equal(self.generator, torch.get_rng_state())

    def restore(self) -> None:
        torch.set_rng_state(self.generator)
        for own, kept in self.pairs:
            foreach_copy_(own, kept)


class Snapshot:
    """The state whose tensors `tensors()` lists, which is called now and at the restoring. Holds a
    copy of them all.

    A tensor that is new at the restoring was made by a step, as an optimizer makes its moments: it
    stays, since a graph may hold it, and becomes zero, as all supported optimizers start theirs.
    device: also keep the random generators of the host and of this device; None inside a capture,
    where asking for their state is an error. module: buffers below it that a step replaces by new
    tensors come back as the old ones.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device | None,
        module: nn.Module | None = None,
    ) -> None:
        self.tensors, self.device = tensors, device
        self.buffers = None if module is None else Buffers(module)
        self.values = {id(t): (t, t.detach().clone()) for t in tensors()}
        if device is not None:
            self.rng = torch.get_rng_state()
            self.cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def buffers_replaced(self) -> bool:
        """Whether some buffer is another tensor than it was."""
        return self.buffers is not None and self.buffers.replaced()

    @torch.no_grad()
    def restore(self) -> None:
        if self.buffers is not None:
            self.buffers.put_back()
        for t in self.tensors():
            part = local_part(t)
            part.copy_(local_part(self.values[id(t)][1])) if id(t) in self.values else part.zero_()
        if self.device is not None:
            torch.set_rng_state(self.rng)
            if self.cuda_rng is not None:
                torch.cuda.set_rng_state(self.cuda_rng, self.device)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Restores the tensors, not the generators, where `condition` (0-d, 0 or 1) is 1. Never
        waits."""
        condition = condition.bool()
        for t in self.tensors():
            part = local_part(t)
            known = id(t) in self.values
            was = local_part(self.values[id(t)][1]) if known else torch.zeros_like(part)
            part.copy_(torch.where(condition, was, part))


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Its state and what its groups hold beside the weights: learning rate, Apex's step count."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    for group in optimizer.param_groups:
        values += [v for name, v in group.items() if name != "params"]
    distinct = {id(v): v for v in values if isinstance(v, Tensor)}
    return list(distinct.values())
