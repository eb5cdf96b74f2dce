"""A host thread for every peer and teacher, on a CPU: forward and backward passes side by side.

Where peers run one after the other, every layer is split over all cores and joined again. Here each
network has a share of the cores for a whole pass: torch's threads over the number of peers and
teachers, one at least. Loss and update, which are for all peers, have such a share too: hundreds of
small weights are updated faster by one thread than by two that wait for each other at each of them.
Threads are started anew for each pass, which takes a fraction of a millisecond, so that none is
alive when a data loader forks.

Peers must not draw random numbers: they share one generator, so the numbers would depend on which
thread comes first. Nor may they communicate with other processes (DistributedDataParallel, FSDP,
collectives of their own): processes match collectives by their order, and threads have no fixed
order. Wrappers are refused when the step is made. The rest is noticed at the first step, which
therefore runs the peers one after the other (each on its share, since results depend on the number
of threads in the last bits). A peer that draws from torch's generator only at a later step, as with
a drop rate that rises, is refused there, before any weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdml.engine.eager import EagerStep, Outputs
from fastdml.engine.execution import ExecutionName, StepOutput, register_execution
from fastdml.engine.guards import Generators, NoCollectives, hooked, replicated
from fastdml.engine.rollback import BeforePass
from fastdml.errors import InputError


def unfit_for_threads(peers: Sequence[nn.Module]) -> str | None:
    """Why these networks, peers and then teachers, could give other results where they run side by
    side, in words; None where nothing shows. Whether they draw random numbers is seen at the first
    step."""
    if len(peers) == 1:
        return "one peer has nobody beside it"
    if hooked(peers):
        return "hooks would be called by several threads at once"
    owners: dict[int, int] = {}
    for k, peer in enumerate(peers):
        for t in (*peer.parameters(), *peer.buffers()):
            if t.numel() and owners.setdefault(t.data_ptr(), k) != k:
                return f"peers {owners[t.data_ptr()]} and {k} share memory"
    return None


@register_execution(
    "threads", turn=1, devices=("cpu",), thread_a_peer=True, unfit=unfit_for_threads
)
class ThreadsStep(EagerStep):
    name: ExecutionName = "threads"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.refuse_replicas()
        self.proved = False

    def refuse_replicas(self) -> None:
        named = [(f"peer {n}", p) for n, p in zip(self.cohort.names, self.peers, strict=True)]
        named += [(f"teacher {t.name}", t) for t in self.teachers]
        for name, network in named:
            if (found := replicated(network)) is not None:
                raise InputError(
                    f"execution 'threads' does not go with peers that talk to other processes: "
                    f"{name} has {found}; use eager"
                )

    def rehearse(self) -> None:
        """Skips the first step's proof, in which peers run one after the other, as fast as eager.
        torch's generator is watched all the same."""
        self._remember()
        self.proved = True

    def _remember(self) -> None:
        self.before = BeforePass(list(self.cohort.buffers()))

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        threads = torch.get_num_threads()
        self.share = max(1, threads // len(self.forwards))
        torch.set_num_threads(self.share)
        try:
            return self._step(images, labels)
        finally:
            torch.set_num_threads(threads)

    def _step(self, images: Tensor, labels: Tensor) -> StepOutput:
        if not self.proved:
            self.refuse_replicas()
            self.generators = Generators(self.amp.device)
            self._remember()
        self.before.keep()
        try:
            output = super().train(images, labels)
        except InputError:  # leaves the peers as they were
            if not self.proved:
                self.generators.restore()
            self.before.restore()
            raise
        self.proved = True
        return output

    def outputs(self, images: Tensor) -> list[Outputs]:
        outputs = self._side_by_side(lambda k: self.forward(k, images), len(self.forwards))
        if self.before.drew() or (not self.proved and self.generators.moved()):
            raise InputError(
                "execution 'threads' does not go with peers that draw random numbers, such as "
                "dropout's: nothing fixes who draws first; use eager"
            )
        return outputs

    def backward(self, outputs: Sequence[Outputs], grads: Sequence[Outputs]) -> None:
        def one(k: int) -> None:
            if any(t.requires_grad for t in outputs[k]):
                super(ThreadsStep, self).backward([outputs[k]], [grads[k]])

        self._side_by_side(one, len(self.peers))

    def _side_by_side(self, work: Callable[[int], Any], n: int) -> list[Any]:
        """`work(k)` for k below n; until the first step is done, one after the other."""

        def limited(k: int) -> Any:
            torch.set_num_threads(self.share)  # of this thread
            with self._watched():
                return work(k)

        with ThreadPoolExecutor(n if self.proved else 1) as pool:
            return list(pool.map(limited, range(n)))

    def _watched(self) -> AbstractContextManager:
        if self.proved or not (dist.is_available() and dist.is_initialized()):
            return nullcontext()
        return NoCollectives(self.name)
