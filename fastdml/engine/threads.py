"""A host thread for every peer, on a CPU: forward and backward passes side by side.

Where peers run one after the other, every layer is split over all cores and joined again. Here each
peer has a share of the cores for a whole pass: torch's threads over the number of peers, one at
least. Loss and update, which are for all peers, have such a share too: hundreds of small weights
are updated faster by one thread than by two that meet at each of them. Threads are started anew for
each pass, a fraction of a millisecond, so that none is alive when a data loader forks.

Peers must not draw random numbers: they share one generator, and whoever came first would draw
first. Dropout and the like are refused at the first step, which therefore runs the peers one after
the other (each on its share, which the bits of a result depend on).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastdml.engine.step import EagerStep, Outputs, StepOutput
from fastdml.errors import InputError


class ThreadsStep(EagerStep):
    name = "threads"

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.proved = False

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        threads = torch.get_num_threads()
        self.share = max(1, threads // len(self.peers))
        torch.set_num_threads(self.share)
        try:
            return super().train(images, labels)
        finally:
            torch.set_num_threads(threads)

    def outputs(self, images: Tensor) -> list[Outputs]:
        if self.proved:
            return self._side_by_side(lambda k: self.forward(k, images))
        before = torch.get_rng_state()
        outputs = self._side_by_side(lambda k: self.forward(k, images), workers=1)
        if not torch.equal(before, torch.get_rng_state()):
            raise InputError(
                "execution 'threads' does not go with peers that draw random numbers, such as "
                "dropout's: nothing fixes who draws first; use eager"
            )
        self.proved = True
        return outputs

    def backward(self, outputs: Sequence[Outputs], grads: Sequence[Outputs]) -> None:
        def one(k: int) -> None:
            if any(t.requires_grad for t in outputs[k]):
                super(ThreadsStep, self).backward([outputs[k]], [grads[k]])

        self._side_by_side(one)

    def _side_by_side(self, work: Callable[[int], Any], workers: int | None = None) -> list[Any]:
        """`work(k)` of every peer."""

        def limited(k: int) -> Any:
            torch.set_num_threads(self.share)  # of this thread
            return work(k)

        with ThreadPoolExecutor(workers or len(self.peers)) as pool:
            return list(pool.map(limited, range(len(self.peers))))
