"""From gradients to weights: unscale, clip, step, and what follows a step.

fp16: every peer has an overflow flag on the device. A peer whose gradients are not finite keeps its
weights, moments and step count; the others are updated. The flag goes to torch's fused optimizers,
which obey it inside their kernel; with any other optimizer the peer's weights and state are copied
before the step and put back where the flag is set (one copy of them more a step). The scale follows
once a training step, by whether any peer overflowed. The host is never asked.

Without fp16 all peers are updated by one multi-tensor call where the optimizer is torch's and its
groups have the same options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastdml.engine.amp import Amp
from fastdml.engine.ema import Ema
from fastdml.engine.snapshot import Snapshot, optimizer_tensors

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

Group = dict[str, Any]


class Update:
    """`apply(ks)` updates some peers, `finish()` ends the training step.

    `overflow` (K,) is 1 where a peer skipped its last update, and `skipped` () where all that train
    did; both are None without fp16.
    """

    def __init__(
        self,
        cohort: Cohort,
        optimizer: Optimizer,
        amp: Amp,
        *,
        grad_clip: float | None = None,
        ema: Ema | None = None,
    ) -> None:
        self.cohort, self.optimizer, self.ema = cohort, optimizer, ema
        self.scaler, self.grad_clip = amp.scaler, grad_clip
        self.weights = [[w for w in p.parameters() if w.requires_grad] for p in cohort.peers]
        self.torchs_own = type(optimizer) in (SGD, Adam, AdamW)
        self.overflow: Tensor | None = None
        self.skipped: Tensor | None = None
        if self.scaler is not None:
            self.overflow = torch.zeros(len(self.weights), device=amp.device)
            self.skipped = torch.zeros((), device=amp.device)

    def tensors(self) -> list[Tensor]:
        """Everything that a training step changes."""
        found = [*self.cohort.parameters(), *self.cohort.buffers()]
        found += optimizer_tensors(self.optimizer)
        if self.scaler is not None:
            found += [*self.scaler.tensors(), self.overflow, self.skipped]
        if self.ema is not None:
            found += self.ema.averages
        return found

    def apply(self, ks: Sequence[int]) -> None:
        """Updates peers `ks` by their gradients, and drops these."""
        ks = [k for k in ks if self.weights[k]]
        for k in ks:
            if self.scaler is not None:
                grads = [w.grad for w in self.weights[k] if w.grad is not None]
                self.overflow[k].copy_(self.scaler.unscale_(grads))
            if self.grad_clip:
                nn.utils.clip_grad_norm_(self.weights[k], self.grad_clip)
        if self.scaler is None and self.torchs_own:
            with self._only(_merged(self._groups(ks))):
                self.optimizer.step()
        else:
            for k in ks:
                with self._only(self._groups([k])):
                    self._step(k)
        for k in ks:
            for w in self.weights[k]:
                w.grad = None

    def finish(self) -> None:
        """Scale and averages follow the step."""
        if self.scaler is not None:
            trained = [self.overflow[k] for k, weights in enumerate(self.weights) if weights]
            flags = torch.stack(trained)
            torch.amin(flags, dim=0, out=self.skipped)
            self.scaler.update_(flags.amax())
        if self.ema is not None:
            self.ema.update()

    def _step(self, k: int) -> None:
        optimizer = self.optimizer
        if self.scaler is None:
            optimizer.step()
        elif self.torchs_own and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, self.overflow[k]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        else:
            before = Snapshot(lambda: self._tensors_of(k), None)
            optimizer.step()
            before.restore_where(self.overflow[k])

    def _tensors_of(self, k: int) -> list[Tensor]:
        """Peer k's weights and their part of the optimizer, whose groups are that peer's now."""
        found = list(self.weights[k])
        for w in self.weights[k]:
            found += [v for v in self.optimizer.state[w].values() if isinstance(v, Tensor)]
        for group in self.optimizer.param_groups:
            step = group.get("step")  # Apex counts steps a group
            found += [step] if isinstance(step, Tensor) else []
        return found

    def _groups(self, ks: Sequence[int]) -> list[Group]:
        """The optimizer's groups, as far as they are of peers `ks`."""
        wanted = {id(w) for k in ks for w in self.weights[k]}
        groups = []
        for group in self.optimizer.param_groups:
            mine = [w for w in group["params"] if id(w) in wanted]
            if mine:
                whole = len(mine) == len(group["params"])
                groups.append(group if whole else {**group, "params": mine})
        return groups

    @contextmanager
    def _only(self, groups: list[Group]) -> Iterator[None]:
        """Inside, the optimizer knows these groups alone."""
        optimizer = self.optimizer
        everything = optimizer.param_groups
        masters = getattr(optimizer, "param_groups_master", None)  # Apex walks both lists together
        optimizer.param_groups = groups
        if masters:
            chosen = {id(group) for group in groups}
            pairs = zip(everything, masters, strict=True)
            optimizer.param_groups_master = [m for group, m in pairs if id(group) in chosen]
        try:
            yield
        finally:
            optimizer.param_groups = everything
            if masters:
                optimizer.param_groups_master = masters


def _merged(groups: list[Group]) -> list[Group]:
    """One group of all weights, where the groups differ in nothing else."""
    first, *others = groups
    for group in others:
        for name, value in first.items():
            other = group[name]
            if name == "params" or value is other:
                continue
            if isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
                return groups
    return [{**first, "params": [w for group in groups for w in group["params"]]}]
