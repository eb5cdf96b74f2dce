"""The step of `streams` on a mesh as one CUDA graph, collectives included.

The first step runs without a graph: ranks tell each other what their peers give, and communicators
come into being. All ranks capture at the second, which takes no collective that is not every
rank's: if one of them cannot, all go on without a graph. Which peers draw random numbers is known
from the first step; a replay cannot seed them one by one, and such peers are refused.

A rank that captured anew by itself would meet nobody in its warm-up steps, so that a step whose
peers, optimizer or loss have changed is refused, not captured again.

On a device this has run with one rank, of which nothing travels: that collectives between devices
are captured and replayed in order is shown by a class that stands in for the capture alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdml.engine.execution import StepOutput
from fastdml.engine.graph import WARM_UP, Contents, CudaCapture, GraphStep
from fastdml.engine.mesh_step import MeshStep, MeshStreamsStep
from fastdml.errors import InputError

DDP_WARM_UP = 11  # steps that torch's documentation asks for before DDP is captured


class MeshGraphStep(GraphStep):
    inner: MeshStep

    def __init__(self, inner: MeshStep, capture: type[CudaCapture] = CudaCapture) -> None:
        options = inner.options
        if options.exchange == "logits" and options.exchange_every > 1:
            raise InputError(
                f"execution 'graph' repeats one step, and with exchange_every="
                f"{options.exchange_every} there are two kinds: use streams"
            )
        super().__init__(inner, capture)
        self.warm_up = WARM_UP if inner.mesh.data == 1 else DDP_WARM_UP
        self.mesh, self.exchange = inner.mesh, inner.exchange
        self.traffic = (0, 0)  # bytes that a step sends and receives

    @property
    def number(self) -> int:
        return self.inner.number

    @number.setter
    def number(self, value: int) -> None:
        self.inner.number = value

    def __call__(self, *batch: Tensor) -> StepOutput:
        inner, exchange = self.inner, self.exchange
        if not inner.agreed:
            return inner(*batch)
        if inner.drawing:
            names = ", ".join(inner.cohort.names[k] for k in sorted(inner.drawing))
            raise InputError(
                f"peer {names} draws random numbers in training (such as dropout), which a graph "
                "on a mesh cannot seed for each peer: use execution streams"
            )
        inner.fetch()
        number, counted = inner.number, (exchange.sent, exchange.received)
        inner.in_graph = True
        try:
            output = super().__call__(*batch)
        finally:
            inner.in_graph = False
        if self.captured is not None and self._fits(batch):  # a replay counts nothing by itself
            exchange.sent = counted[0] + self.traffic[0]
            exchange.received = counted[1] + self.traffic[1]
        inner.number = number + 1
        return output

    def _run(self) -> Tensor:
        exchange = self.exchange
        before = exchange.sent, exchange.received
        packed = super()._run()
        self.traffic = exchange.sent - before[0], exchange.received - before[1]
        return packed

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        super()._capture(batch)
        reasons = self.mesh.gather(self.failure or "")
        for rank, reason in enumerate(reasons):
            if reason and self.failure is None:
                self._fail(f"{reason} (on rank {rank})")
        if self.failure is not None:
            self.captured = None

    def _check_contents(self, contents: Contents) -> None:
        contents.take_numbers()
        if (changed := contents.changed()) is not None:
            raise InputError(
                f"{changed} has changed since the step was captured, and ranks of a mesh cannot "
                "capture it anew by themselves: make a new step on every rank, or use streams"
            )


def graph_on_a_mesh(*arguments: Any) -> MeshGraphStep:
    return MeshGraphStep(MeshStreamsStep(*arguments))
