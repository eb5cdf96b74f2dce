"""execution="auto": chosen at the first step, in one line on stderr.

On CUDA by measurement. Each candidate runs a few steps on the first batch, is timed over a few
more, and the state is restored bit for bit. Candidates that cannot run here (peers of several
architectures cannot be stacked) are left out. Costs some tens of steps and the start-up of every
candidate, and the memory of two of them at once; name an execution to save them. A run that resumes
takes the execution that it began with. Eager without measuring where the optimizer counts on the
host: what it counted could not be restored, and a graph would freeze its learning rate.

On a CPU by a rule, since two runs of the same settings must not differ in rounding: stacked where
the batch is so small that calls cost more than arithmetic, else threads where every peer has a core
and is a model of ours without dropout, else eager. Milliseconds of a whole step
in fp32 (medians of interleaved rounds on a shared 2-core AMD EPYC; repeats differ by 10 %):

    peers             batch      1 thread: eager  stacked    2 threads: eager  stacked
    2 resnet8      64 x 8x8                 55.3     50.2                34.0     31.5
    4 resnet8      64 x 8x8                101.0     96.1                67.0     45.4
    2 resnet20    64 x 32x32               929.9   1019.3               847.6    875.2
    2 wrn_10_2    32 x 32x32               486.1    534.0               627.0    629.4
    2 mobilenet   16 x 32x32              1279.7   1706.8              1336.0   1864.0
    2 resnet8    256 x 32x32              1000.5   1291.7              1987.8   2764.0

Two resnet32 at 64 x 32x32 and 2 threads, another day (bench/results/step-cpu-epyc.json): eager
621.8, stacked 641.6, threads 598.7.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdml.engine.graph import SCALARS
from fastdml.engine.guards import replicated
from fastdml.engine.snapshot import Snapshot
from fastdml.engine.step import StepOutput
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.engine import Step

WARM_UP, TIMED = 3, 10  # steps of each candidate
ORDER = ("eager", "streams", "stacked", "graph")  # in which they are measured
OURS = tuple(
    f"fastdml.models.{name}" for name in ("resnet_cifar", "wide_resnet", "mobilenet", "googlenet")
)
SMALL = 4096  # pixels of a batch up to which a CPU stacks, 64 images of 8x8


def fits_threads(peers: Sequence[nn.Module]) -> bool:
    """Whether each peer can have a core, is known to draw no random numbers, and is alone: no
    replica of others, nor a part of it."""
    ours = all(type(getattr(peer, "backbone", peer)).__module__ in OURS for peer in peers)
    dropout = any(
        isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for p in peers for m in p.modules()
    )
    cores = 1 < len(peers) <= torch.get_num_threads()
    return ours and not dropout and cores and not any(map(replicated, peers))


class AutoStep:
    """A step that becomes another at its first call."""

    def __init__(
        self, names: Sequence[str], make: Callable[[str], Step], device: torch.device
    ) -> None:
        self.names, self.make, self.device = names, make, device
        self.chosen: Step | None = None

    def __getattr__(self, name: str) -> Any:
        """`update`, `tensors` and the rest of the chosen step."""
        if name.startswith("__") or self.__dict__.get("chosen") is None:
            raise AttributeError(f"{name!r}: the execution is chosen at the first step")
        return getattr(self.chosen, name)

    def __call__(self, *batch: Tensor) -> StepOutput:
        if self.chosen is None:
            cuda = self.device.type == "cuda"
            self.chosen = self._measure(batch) if cuda else self._rule(batch)
        return self.chosen(*batch)

    def _rule(self, batch: tuple[Tensor, ...]) -> Step:
        images = batch[0]
        if images.dim() == 4 and images[:, 0].numel() <= SMALL:
            try:
                step = self.make("stacked")
                step.prove(images)
            except InputError:
                pass  # eager can do without what stacking needs
            else:
                print("execution: stacked (a small batch on a CPU)", file=sys.stderr)
                return step
        name = "threads" if "threads" in self.names else "eager"
        print(f"execution: {name}", file=sys.stderr)
        return self.make(name)

    def _measure(self, batch: tuple[Tensor, ...]) -> Step:
        best, times = None, {}
        # The graph last: it keeps the addresses of the weights, which stacking moves. Eager first:
        # a graph's memory is its own for as long as it lives, and eager is what must not fail.
        for name in sorted(self.names, key=ORDER.index):
            try:
                step = self.make(name)
                seconds = self._seconds(step, batch)
            except (InputError, RuntimeError):  # of the latter: out of memory, no such kernel
                if name == "eager":
                    raise
                continue
            if getattr(step, "failure", None) is None:
                times[name] = seconds
                if seconds == min(times.values()):
                    best = step
            del step  # the slower one's memory goes to the next
        found = ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in times.items())
        print(f"execution: {best.name} (ms a step: {found})", file=sys.stderr)
        return best

    def _seconds(self, step: Step, batch: tuple[Tensor, ...]) -> float:
        """Of one step, from calls that nothing waits between. Leaves no trace."""
        inner = getattr(step, "inner", step)
        snapshot = Snapshot(step.tensors, self.device, inner.cohort)
        loss = inner.loss
        numbers = {name: getattr(loss, name) for name in SCALARS}  # a graph makes tensors of them
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the one that is chosen says it again
                for _ in range(WARM_UP):
                    step(*batch)
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            for _ in range(TIMED):
                step(*batch)
            torch.cuda.synchronize(self.device)
            return (time.perf_counter() - started) / TIMED
        finally:
            snapshot.restore()
            for name, value in numbers.items():
                setattr(loss, name, value)
