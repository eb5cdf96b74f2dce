"""execution="auto": chosen at the first step, in one line on stderr.

On CUDA by measurement. Each candidate runs a few steps on the first batch, is timed over a few
more, and the state is restored bit for bit. Candidates that cannot run here (peers of several
architectures cannot be stacked) are left out. Costs some tens of steps and the start-up of every
candidate, and the memory of two of them at once; name an execution to save this. An optimizer that
counts its steps on the host runs eager, without a measurement: its count could not be restored, and
a graph would freeze its learning rate.

On a CPU execution and number of threads are measured together, on copies
(`fastdml.engine.rehearsal`), which takes two copies of the weights and of the optimizer's state.
Two runs of the same settings may therefore choose differently, and then differ in rounding; a run
that resumes takes what it began with.

On a CPU a rule decides instead where torch's deterministic algorithms are asked for, so that runs
repeat: threads where every peer has a core and may run beside the others, else eager, on one thread
where the batch is as small as digits' and else on all. The same rule, with eager only, decides
where steps on copies would have effects outside of the copies: with hooks, compiled peers, or
several processes.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdml.engine import cpus
from fastdml.engine.eager import check_gradients_wanted
from fastdml.engine.execution import EXECUTIONS, ExecutionName, Step, StepOutput
from fastdml.engine.graph import SCALARS
from fastdml.engine.guards import hooked, replicated
from fastdml.engine.rehearsal import Candidate, Rehearsal, Uncopyable, candidates, fastest
from fastdml.engine.rollback import Snapshot
from fastdml.engine.stackable import Unstackable
from fastdml.errors import InputError
from fastdml.torch_private import wraps_compiled
from fastdml.units import count_of_threads

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.engine.update import Update
    from fastdml.loss import MutualLoss


logger = logging.getLogger(__name__)
WARM_UP, TIMED = 3, 10  # steps of each candidate on CUDA
SMALL = 4096  # pixels of a batch (64 images of 8x8) up to which a second thread does not pay


class Choice(NamedTuple):
    """The execution and the number of threads that were chosen. elsewhere: the number of threads
    outside of steps, such as in evaluation."""

    execution: ExecutionName
    threads: int | None = None  # None on CUDA
    elsewhere: int | None = None


class AutoStep:
    """A step that chooses its execution at its first call, and from then on passes calls to it."""

    device: torch.device
    make: Callable[[ExecutionName], Step]
    chosen: Step | None = None

    # These are the chosen step's, found by __getattr__.
    name: ExecutionName
    cohort: Cohort
    loss: MutualLoss
    update: Update
    failure: str | None
    tensors: Callable[[], list[Tensor]]
    release: Callable[[], None]
    rehearse: Callable[[], None]

    def __call__(self, *batch: Tensor) -> StepOutput:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """`update`, `tensors` and the rest of the chosen step."""
        if name.startswith("__") or self.chosen is None:
            raise AttributeError(f"{name!r}: the execution is chosen at the first step")
        return getattr(self.chosen, name)


class CudaAutoStep(AutoStep):
    def __init__(
        self,
        names: Sequence[ExecutionName],
        make: Callable[[ExecutionName], Step],
        device: torch.device,
    ) -> None:
        self.names, self.make, self.device = names, make, device

    def __call__(self, *batch: Tensor) -> StepOutput:
        check_gradients_wanted()
        step = self._step(batch)
        try:
            return step(*batch)
        except Unstackable as error:  # peers that have changed; the step had not begun
            why = _brief("stacked", str(error))
            logger.info("execution: eager; not stacked: %s", why)
            self.chosen = step = self.make("eager")
            return step(*batch)

    def choose(self, *batch: Tensor) -> Choice:
        """What this step runs as, from now on; measures where that is still open."""
        return Choice(self._step(batch).name)

    def _step(self, batch: tuple[Tensor, ...]) -> Step:
        if self.chosen is None:
            self.chosen = self._measure(batch)
        return self.chosen

    def _measure(self, batch: tuple[Tensor, ...]) -> Step:
        best: Step | None = None
        times: dict[str, float] = {}
        unfit = ""
        # Eager first: it must not fail, and a graph keeps its memory for as long as it lives. Last
        # those that rely on the addresses of the weights, since others move the weights.
        found = sorted(map(EXECUTIONS.__getitem__, self.names), key=lambda e: e.turn)
        for execution in sorted(found, key=lambda e: e.keeps_addresses):
            name = execution.name
            step: Step | None = None
            try:
                step = self.make(name)
                seconds = self._seconds(step, batch)
            except (InputError, RuntimeError) as error:  # out of memory, a kernel that is missing
                if name == "eager":
                    raise
                if isinstance(error, Unstackable):
                    unfit = f"; not stacked: {_brief('stacked', str(error))}"
            else:
                if step.failure is None:
                    times[name] = seconds
                    if seconds == min(times.values()):
                        best, step = step, best
            if step is not None:
                step.release()
            del step  # the slower one's memory goes to the next
        assert best is not None  # eager has been measured or has raised
        took = ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in times.items())
        logger.info("execution: %s (ms a step: %s)%s", best.name, took, unfit)
        return best

    def _seconds(self, step: Step, batch: tuple[Tensor, ...]) -> float:
        """Seconds a step takes, from calls without a wait between them. Leaves no trace."""
        snapshot, loss = Snapshot(step.tensors, self.device, step.cohort), step.loss
        numbers = {name: getattr(loss, name) for name in SCALARS}  # a graph puts tensors there
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


class CpuAutoStep(AutoStep):
    """An `AutoStep` on a CPU: its steps run on the chosen number of threads, and torch's number is
    the caller's again after each.

    names: the executions to choose from, with their number of threads; a single one is made at
    once. peers: and teachers, the networks that may run side by side. threads: the only number to
    consider.
    copies: see `Rehearsal`. unfit: executions that were left out, with the reason. by_rule: why
    nothing can be measured.
    """

    def __init__(
        self,
        names: Sequence[ExecutionName],
        make: Callable[[ExecutionName], Step],
        peers: Sequence[nn.Module],
        *,
        threads: int | None,
        copies: Callable[[], Callable[[ExecutionName], Step]],
        unfit: dict[str, str],
        by_rule: str | None,
    ) -> None:
        self.names, self.make, self.device = names, make, torch.device("cpu")
        self.peers, self.copies, self.unfit, self.by_rule = peers, copies, unfit, by_rule
        self.threads = threads
        self.choice: Choice | None = None
        self.seconds: float | None = None  # of a step, where it was measured
        if len(names) == 1:
            self.chosen = make(names[0])

    def __call__(self, *batch: Tensor) -> StepOutput:
        check_gradients_wanted()
        choice, step = self._decided(batch)
        with cpus.threads(choice.threads):
            try:
                return step(*batch)
            except InputError as error:
                if len(self.names) == 1 or choice.execution == "eager":
                    raise
                return self._without(choice, error, batch)

    def choose(self, *batch: Tensor) -> Choice:
        """What this step runs as, from now on; chooses where that is still open."""
        return self._decided(batch)[0]

    def _decided(self, batch: tuple[Tensor, ...]) -> tuple[Choice, Step]:
        if self.choice is None:
            self.choice = self._choose(batch)
        choice, step = self.choice, self.chosen
        if step is None:
            try:
                step = self.chosen = self.make(choice.execution)
            except InputError as error:
                if choice.execution == "eager":
                    raise
                step = self.make("eager")
                choice = self._take_eager(choice, step, error)
        return choice, step

    def _choose(self, batch: tuple[Tensor, ...]) -> Choice:
        found = candidates(self.names, len(self.peers), self.threads)
        if self.by_rule:
            choice = self._choice(self._rule(found, batch))
            _say(choice, f"by rule: {self.by_rule}", self.unfit)
        elif len(found) == 1:
            choice = self._choice(found[0])
            if self.unfit:
                _say(choice, None, self.unfit)
        else:
            choice = self._measured(found, batch)
        return choice

    def _rule(self, found: Sequence[Candidate], batch: tuple[Tensor, ...]) -> Candidate:
        for candidate in found:
            if EXECUTIONS[candidate.execution].thread_a_peer:
                return candidate
        images = batch[0]
        same = [c for c in found if c.execution == found[0].execution]
        small = isinstance(images, Tensor) and images.dim() == 4 and images[:, 0].numel() <= SMALL
        return same[0 if small else -1]

    def _measured(self, found: Sequence[Candidate], batch: tuple[Tensor, ...]) -> Choice:
        rehearsal = Rehearsal(self.copies, batch)
        try:
            rehearsal.run(found)
        except Uncopyable as error:
            same = [c for c in found if c.execution == found[0].execution]
            choice = self._choice(self._rule(same, batch))
            _say(choice, f"by rule: {error}")
            return choice
        best = fastest(rehearsal.times)
        self.seconds = rehearsal.times[best]
        eager = {c: t for c, t in rehearsal.times.items() if c.execution == "eager"}
        choice = self._choice(best, fastest(eager).threads if eager else None)
        took = [f"{c} {1000 * t:.1f}" for c, t in rehearsal.times.items()]
        took += [f"{c} given up" for c in rehearsal.late]
        _say(choice, f"ms a step: {', '.join(took)}", {**self.unfit, **rehearsal.unfit})
        return choice

    def _choice(self, found: Candidate, elsewhere: int | None = None) -> Choice:
        """The choice, with the number of threads outside of steps: the user's; else what was
        measured for eager; else one peer's share, since a measurement of threads with a peer each
        says nothing about threads that split a layer and wait for each other after it."""
        share = found.threads
        if EXECUTIONS[found.execution].thread_a_peer:
            share = max(1, found.threads // len(self.peers))
        return Choice(*found, self.threads or elsewhere or share)

    def _without(self, choice: Choice, error: InputError, batch: tuple[Tensor, ...]) -> StepOutput:
        """Eager from here on, unless that fails as well; a refused step has changed nothing."""
        step = self.make("eager")
        output = step(*batch)
        self._take_eager(choice, step, error)
        return output

    def _take_eager(self, choice: Choice, step: Step, error: InputError) -> Choice:
        self.chosen, self.choice = step, choice._replace(execution="eager")
        _say(self.choice, None, {choice.execution: str(error)})
        return self.choice


def _say(choice: Choice, how: str | None, unfit: dict[str, str] | None = None) -> None:
    assert choice.threads is not None  # on a CPU
    how = f" ({how})" if how else ""
    reasons = "".join(f"; not {name}: {_brief(name, why)}" for name, why in (unfit or {}).items())
    what = f"{choice.execution}, {count_of_threads(choice.threads)}"
    logger.info("execution: %s%s%s", what, how, reasons)


def _brief(name: str, reason: str) -> str:
    """The reason of a refusal: its message without the execution's name at the start and the advice
    to use another one at the end."""
    return re.sub(r"; use [\w ]+$", "", reason.removeprefix(f"execution {name!r} "))


def only_by_rule(peers: Sequence[nn.Module], compiled: bool) -> str | None:
    """Why steps on copies must not be measured here, in words; None where they may."""
    if compiled or any(wraps_compiled(m) for p in peers for m in p.modules()):
        return "compiled peers would be compiled anew for each candidate"
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if together or any(map(replicated, peers)):
        return "several processes might choose differently"
    if hooked(peers):
        return "hooks would be called by what is measured"
    return None
