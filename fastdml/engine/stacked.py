"""Peers of one architecture as one network (`stack`): K times the channels, the same launches.

Peers are checked (`stackable`) when the step is made and again at its first call, which then
compares a stack of copies with them (`stack_proof`). Only peers that pass both are stacked;
others are refused and left as they were.

Each step looks for changes since. A layer's training flag and a weight's requires_grad are taken
over, new modes after a new proof. After any other change (a setting, a weight replaced, moved or
cast) the peers are checked, proved and stacked anew. Where they are then refused, as for hooks,
`release` has given them memory of their own again.

On a CPU it gains a little on small maps, and loses on others, where K convolutions are faster than
one in K groups. `torch.func`'s stack_module_state and vmap do the same without layers of their own,
and slower (forward and backward in fp32, one thread, medians of interleaved rounds: 2 resnet8 at
64 x 8x8 eager 62.6, stacked 54.0, vmap 80.5 ms; 4 of them 121.0, 114.8, 157.4; 2 resnet32 at
64 x 32x32 2367, 2189, 2706).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.engine.amp import Amp
from fastdml.engine.eager import EagerStep, Outputs, count_ensemble, with_metric
from fastdml.engine.execution import ExecutionName, StepOptions, StepOutput, register_execution
from fastdml.engine.graph import GraphStep
from fastdml.engine.stack import KNOWN, Stack
from fastdml.engine.stack_proof import prove
from fastdml.engine.stackable import (
    Unstackable,
    Watch,
    check,
    check_accumulators,
    check_modes,
    unknown,
)
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats

if TYPE_CHECKING:
    from fastdml.cohort import Cohort


class StackedStep(EagerStep):
    name: ExecutionName = "stacked"

    def networks(self) -> list[nn.Module]:
        self.own = super().networks()
        check(self.own, KNOWN)
        self.stack = Stack()
        self.watch: Watch | None = None
        self.modes: tuple[bool, ...] = ()
        self.proved: set[object] = set()  # modes, and the shape and dtype of images
        return [self.stack]

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        self.prove(images)
        return super().train(images, labels)

    def prove(self, images: Tensor) -> None:
        """Stacks the peers where this is not done, or they have changed; at images of a new size
        and at new modes compares them again. Refused peers are released."""
        try:
            if not isinstance(images, Tensor):
                raise unknown(f"images of type {type(images).__name__}")
            self._prove(images)
        except Unstackable:
            self.release()
            raise

    def _prove(self, images: Tensor) -> None:
        changed = self.stale()
        if changed:
            check(self.own, KNOWN)
            if self.watch is None or self.watch.changed_more_than_modes():
                self.proved, self.watch = set(), None
        modes = check_modes(self.own) if changed else self.modes
        case = modes, images.shape[1:], images.dtype
        if case not in self.proved:
            prove(Stack, self.own, images)
            self.proved.add(case)
        if self.watch is None:
            check_accumulators(self.own)
            self.stack.fill(self.own)
            self.stack.adopt()
        if changed:
            self.stack.follow()
            self.modes, self.watch = modes, Watch(self.own)

    def stale(self) -> bool:
        return self.watch is None or self.watch.changed()

    def release(self) -> None:
        """Gives each peer memory of its own for its weights again."""
        self.stack.release()
        self.watch = None

    def checked(self, k: int, out: Tensor | tuple[Tensor, ...], images: Tensor) -> Outputs:
        """The stack's outputs (K, N, ...); the form of peer 0's is checked, and is that of all."""
        out = (out,) if isinstance(out, Tensor) else out
        own = [t[0] for t in out]
        super().checked(0, own[0] if len(own) == 1 else tuple(own), images)
        return out

    def gradients(self, images: Tensor, labels: Tensor, loss: MutualLoss) -> StepOutput:
        out = self.forward(0, images)  # logits (K, N, C), and with a metric loss features (K, N, D)
        losses, stats, grads = self.mutual(out[0].detach(), images, labels, loss)
        output = StepOutput(losses, stats)
        if self.options.metric is not None:
            metric, more = self.options.metric.value_and_grad(out[1].detach().unbind(), labels)
            output = StepOutput(with_metric(losses, metric), stats, metric)
            grads = [*grads, torch.stack(more)]
        self.backward([out], [tuple(grads)])
        self.stack.share_gradients()
        return output

    def mutual(
        self, stacked: Tensor, images: Tensor, labels: Tensor, loss: MutualLoss
    ) -> tuple[Tensor, MutualStats, list[Tensor]]:
        """Losses, statistics, and the gradient of the peers' logits (K, N, C), beside which the
        teachers run one by one."""
        if not self.teachers:
            losses, stats, found = loss.value_and_grad(stacked, labels)
            return losses, stats, cast(list[Tensor], found)
        taught = [self.forward(k, images)[0] for k in range(1, len(self.forwards))]
        peers = [z.requires_grad_() for z in stacked.detach().unbind()]  # those who learn
        losses, stats, found = loss.value_and_grad([*peers, *taught], labels)
        count_ensemble(stats, peers, labels, self.cohort.groups)
        return losses, stats, [torch.stack(cast(list[Tensor], found[: len(peers)]))]


@register_execution("stacked", turn=4, moves_weights=True)
def stacked_step(
    cohort: Cohort, loss: MutualLoss, optimizer: Optimizer, amp: Amp, options: StepOptions
) -> StackedStep | GraphStep:
    """On CUDA captured as one graph."""
    if options.output is not None:
        raise InputError("output= does not go with execution 'stacked': wrap the peers instead")
    step = StackedStep(cohort, loss, optimizer, amp, options)
    return GraphStep(step) if amp.device.type == "cuda" else step
