"""Counters of finished programs: the program that finishes last adds up what all have left.

A counter is zero before a launch and after it, so that launches in a row share one; two that may
run side by side need two. On one stream launches follow each other. A captured launch is replayed
at any time on any stream, though never beside itself, as the driver runs a graph's executable once
at a time: it keeps a counter until its graph is gone.

All counters of a device are slots of one block, made and zeroed before the first launch or while
the loss is traced. Never later and never in a capture: what a capture zeroes is zero only after
that graph has run. And never in a private pool of memory, whose owner (CUDA-graph trees, which run
under `torch.compile(mode="reduce-overhead")`) takes what outlives a call for an error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock, get_ident

import torch
from torch import Tensor

from .graph_end import GraphEnd

FIRST_CALL_IN_CAPTURE = (
    "the first call of the mutual loss on {device} is inside the capture of a CUDA graph, where "
    "memory that other graphs share cannot be made: call the loss once, with the same shapes and "
    "options, before the capture"
)


class Counters:
    """The counters of one device; `counters_of` makes one of them for each."""

    SLOTS = 4096  # of a block
    # Triton compiles another kernel for a pointer that is not aligned to 16 bytes, which inside a
    # capture is an error.
    APART = 4  # int32 from slot to slot

    def __init__(self, device: torch.device) -> None:
        self.device, self.lock = device, Lock()
        self.blocks: list[Tensor] = []
        self.free: list[int] = []  # slots; those of the second block begin at SLOTS
        # A handle names one stream, or streams of which one has finished before the next is made;
        # torch's allocator relies on that too. So does one thread of the interpreter.
        self.of_stream: dict[int, Tensor] = {}
        self.of_graph: dict[int, GraphEnd] = {}  # by slot
        self._add_block()

    def take(self, stream: int | None = None) -> Tensor:
        """A zeroed counter, (1,) int32, for a launch on the current stream of the current device,
        of which `stream` is the handle. Allocates nothing, but where `SLOTS` is exceeded."""
        if self.device.type != "cuda":
            stream = get_ident()
        else:
            if stream is None:
                stream = torch.cuda.current_stream(self.device).cuda_stream
            if torch.cuda.is_current_stream_capturing():
                return self._of_captured(stream)
        counter = self.of_stream.get(stream)
        return self._of_new_stream(stream) if counter is None else counter

    def example(self) -> Tensor:
        """What a kernel is compiled for before it is launched; of no launch, and none is used up,
        which a capture would keep."""
        return self._counter(0)

    def _of_new_stream(self, stream: int) -> Tensor:
        with self.lock:
            if stream not in self.of_stream:
                self._reclaim()
                if not self.free:
                    self._add_block()
                self.of_stream[stream] = self._counter(self.free.pop())
            return self.of_stream[stream]

    def _of_captured(self, stream: int) -> Tensor:
        with self.lock:
            self._reclaim()
            if self.free:
                slot = self.free.pop()
                end = GraphEnd.of_capture(stream)
                if end is not None:
                    self.of_graph[slot] = end
                return self._counter(slot)
        # All are taken. Memory of the graph's own does too, at the price of a node that zeroes it
        # in every replay.
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    def _reclaim(self) -> None:
        """Takes back the slots of graphs that are gone, once the others are used up."""
        if not self.free:
            self.free = [slot for slot, end in self.of_graph.items() if end.reached()]
            for slot in self.free:
                del self.of_graph[slot]

    def _counter(self, slot: int) -> Tensor:
        block, place = divmod(slot, self.SLOTS)
        return self.blocks[block][self.APART * place :][:1]

    def _add_block(self) -> None:
        first = self.SLOTS * len(self.blocks)
        self.blocks.append(_zeros(self.APART * self.SLOTS, self.device))
        self.free = list(range(first, first + self.SLOTS))[::-1]


def _zeros(size: int, device: torch.device) -> Tensor:
    """(size,) int32, zero on every stream. Made by a thread of its own: private pools of memory
    and dispatch modes (FakeTensorMode while the loss is traced) are those of the thread that
    has switched them on."""

    def make() -> Tensor:
        zeros = torch.zeros(size, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).record_event().synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


_made: dict[torch.device, Counters] = {}
_making = Lock()


def counters_of(device: torch.device) -> Counters:
    """The counters of a device. Raises RuntimeError where none were made before a capture."""
    found = _made.get(device)
    return _make(device) if found is None else found


def _make(device: torch.device) -> Counters:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(FIRST_CALL_IN_CAPTURE.format(device=device))
    with _making:
        if device not in _made:
            _made[device] = Counters(device)
        return _made[device]


def prepare(device: torch.device) -> None:
    """Makes the counters of a CUDA device of which tensors are traced, where it exists, so that the
    first run of what is traced may be a capture."""
    known = device.type != "cuda" or device in _made
    if known or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return
    if device.index is not None and device.index < torch.cuda.device_count():
        _make(device)
