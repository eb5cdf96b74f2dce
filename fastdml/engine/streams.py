"""A CUDA stream for every peer and teacher: forward and backward passes side by side.

Fork: the peers' streams wait for the batch. Join: the caller's stream waits for what they give,
logits and features, and computes the losses. Autograd runs each backward operation on the stream of
its forward operation, so the backward forks by itself; it is joined before the update reads the
gradients. In eager mode one host thread still issues every launch, so small networks gain nothing
until the step is captured (`fastdml.engine.graph`); large ones overlap where one peer leaves the
device idle.

Memory. A tensor belongs to the stream that it was allocated on, and when it is freed its memory is
given out again in that stream's order. Every tensor that crosses here is freed behind a join that
orders its last use before anything the owning stream does next, so none needs `record_stream`
(which would keep memory from being used again inside a captured graph):

    images, gradients of the outputs  caller's stream; kept until the join after the backward
    logits, features                  peer's; used by the losses, kept until the end of the step
    gradients of the weights          peer's; freed after the update, and the peer's stream does
                                      nothing more before it waits for the caller's at the next fork

The same streams serve every step: autograd's nodes remember theirs, and one that outlived a step
would otherwise draw a stream from outside into a capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdml.engine.eager import EagerStep, Outputs
from fastdml.engine.execution import ExecutionName, register_execution


@register_execution("streams", turn=2, devices=("cuda",))
class StreamsStep(EagerStep):
    name: ExecutionName = "streams"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = [torch.cuda.Stream(self.amp.device) for _ in self.forwards]

    def outputs(self, images: Tensor) -> list[Outputs]:
        main = torch.cuda.current_stream(self.amp.device)
        outputs = []
        for k, stream in enumerate(self.streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                outputs.append(self.forward(k, images))
        self._join(main)
        return outputs

    def backward(self, outputs: Sequence[Outputs], grads: Sequence[Outputs]) -> None:
        super().backward(outputs, grads)
        self._join(torch.cuda.current_stream(self.amp.device))

    def _join(self, main: torch.cuda.Stream) -> None:
        for stream in self.streams:
            main.wait_stream(stream)
