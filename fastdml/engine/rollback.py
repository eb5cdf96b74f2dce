"""The whole state that a training step changes, kept and put back bit for bit.

Warm-up and measurement run real steps; afterwards nothing may tell that they happened. Tensors are
restored in place, so that whoever holds them (a captured graph, an optimizer) still does. Costs a
copy of the weights and the optimizer's state while it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.engine.weights import Buffers


class Snapshot:
    """`tensors` lists the tensors of the state, then and now.

    One that appears between the two was made by the first step, as an optimizer makes its
    moments: it stays, since a graph may hold it, and becomes zero, which is how all optimizers in
    use start theirs. `device`: the random generators of the host and of this device are kept too;
    with None they are not, as inside a capture, where asking for their state is an error.
    `module`: buffers below it that a step replaces by new tensors come back as the old ones.
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

    @torch.no_grad()
    def restore(self) -> None:
        if self.buffers is not None:
            self.buffers.put_back()
        for t in self.tensors():
            t.copy_(self.values[id(t)][1]) if id(t) in self.values else t.zero_()
        if self.device is not None:
            torch.set_rng_state(self.rng)
            if self.cuda_rng is not None:
                torch.cuda.set_rng_state(self.cuda_rng, self.device)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """The tensors alone, and only where `condition` (0-d, 0 or 1) is 1. Never waits."""
        condition = condition.bool()
        for t in self.tensors():
            was = self.values[id(t)][1] if id(t) in self.values else torch.zeros_like(t)
            t.copy_(torch.where(condition, was, t))


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Its state and what its groups hold beside the weights: learning rate, Apex's step count."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    for group in optimizer.param_groups:
        values += [v for name, v in group.items() if name != "params"]
    distinct = {id(v): v for v in values if isinstance(v, Tensor)}
    return list(distinct.values())
