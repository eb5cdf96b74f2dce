"""The counter of finished programs that a launch takes: its last program adds all partial sums."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


class Counters:
    """Zeroed int32 counters of one device: one for each stream, and one for each captured launch,
    which may replay at any time and so never shares."""

    CAPTURED = 4096
    # Triton specialises kernels on the 16-byte alignment of a pointer, and a counter that is not
    # aligned like the warm-up's would compile another kernel, which inside a capture is an error.
    APART = 4  # int32 from one counter to the next

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captured = torch.zeros(self.APART * self.CAPTURED, dtype=torch.int32, device=device)
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}

    def take(self) -> Tensor:
        if self.device.type != "cuda":
            return self.captured[:1]
        if torch.cuda.is_current_stream_capturing():
            if self.used == self.CAPTURED:  # the graph then zeroes its own, one more node
                return torch.zeros(1, dtype=torch.int32, device=self.device)
            self.used += 1
            return self.captured[self.APART * (self.used - 1) :][:1]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if stream not in self.of_stream:
            self.of_stream[stream] = torch.zeros(1, dtype=torch.int32, device=self.device)
        return self.of_stream[stream]


@cache
def counters_of(device: torch.device) -> Counters:
    return Counters(device)
