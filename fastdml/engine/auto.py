"""execution="auto": chosen at the first step, in one line on stderr.

On CUDA by measurement. Each candidate runs a few steps on the first batch, is timed over a few
more, and the state is restored bit for bit. Candidates that cannot run here (peers of several
architectures cannot be stacked) are left out. Costs some tens of steps and the start-up of every
candidate, and the memory of two of them at once; name an execution to save them. Eager without
measuring where the optimizer counts on the host: what it counted could not be restored, and a graph
would freeze its learning rate.

On a CPU with the number of threads, in one measurement on copies (`fastdml.engine.rehearsal`): two
copies of the weights and of the optimizer's state meanwhile. Two runs of the same settings may
therefore choose differently, and then differ in rounding; a run that resumes takes what it began
with. By a rule, so that runs repeat, where torch's deterministic algorithms are asked for: threads
where every peer has a core and may run beside the others, else eager, on one thread where the batch
is as small as digits' and else on all. By that rule too, eager alone, where a rehearsal would not
stay one: with hooks, compiled peers and several processes.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdml.engine import cpus
from fastdml.engine.graph import SCALARS
from fastdml.engine.guards import replicated
from fastdml.engine.rehearsal import Candidate, Rehearsal, Uncopyable, candidates, fastest
from fastdml.engine.rollback import Snapshot
from fastdml.engine.stackable import (
    Unstackable,
    hooked_module,
    hooked_tensor,
    hooks_on_all_modules,
)
from fastdml.engine.stacked import StackedStep
from fastdml.engine.step import EagerStep, StepOutput, check_gradients_wanted
from fastdml.errors import InputError
from fastdml.units import count_of_threads

if TYPE_CHECKING:
    from fastdml.engine import Step

WARM_UP, TIMED = 3, 10  # steps of each candidate on CUDA
ORDER = ("eager", "streams", "stacked", "graph")  # in which they are measured there
SMALL = 4096  # pixels of a batch, 64 images of 8x8, whose layers are not worth a second thread


class Choice(NamedTuple):
    """What steps run as. elsewhere: the number of threads on which torch's own operations, such as
    those of evaluations, had better run."""

    execution: str
    threads: int | None = None  # None on CUDA
    elsewhere: int | None = None


class AutoStep:
    """A step that becomes another at its first call."""

    device: torch.device
    make: Callable[[str], Step]
    chosen: Step | None = None

    def __getattr__(self, name: str) -> Any:
        """`update`, `tensors` and the rest of the chosen step."""
        if name.startswith("__") or self.chosen is None:
            raise AttributeError(f"{name!r}: the execution is chosen at the first step")
        return getattr(self.chosen, name)


class CudaAutoStep(AutoStep):
    def __init__(
        self, names: Sequence[str], make: Callable[[str], Step], device: torch.device
    ) -> None:
        self.names, self.make, self.device = names, make, device

    def __call__(self, *batch: Tensor) -> StepOutput:
        check_gradients_wanted()
        self.choose(*batch)
        try:
            return self.chosen(*batch)
        except Unstackable as error:  # peers that have changed; the step had not begun
            why = _brief("stacked", str(error))
            print(f"execution: eager; not stacked: {why}", file=sys.stderr)
            self.chosen = self.make("eager")
            return self.chosen(*batch)

    def choose(self, *batch: Tensor) -> Choice:
        """What this step runs as, from now on; measures where that is still open."""
        if self.chosen is None:
            self.chosen = self._measure(batch)
        return Choice(self.chosen.name)

    def _measure(self, batch: tuple[Tensor, ...]) -> Step:
        best, times, unfit = None, {}, ""
        # The graph last: it keeps the addresses of the weights, which stacking moves. Eager first:
        # a graph's memory is its own for as long as it lives, and eager is what must not fail.
        for name in sorted(self.names, key=ORDER.index):
            step = None
            try:
                step = self.make(name)
                seconds = self._seconds(step, batch)
            except (InputError, RuntimeError) as error:  # of these: out of memory, no such kernel
                if name == "eager":
                    raise
                if isinstance(error, Unstackable):
                    unfit = f"; not stacked: {_brief('stacked', str(error))}"
            else:
                if getattr(step, "failure", None) is None:
                    times[name] = seconds
                    if seconds == min(times.values()):
                        best, step = step, best
            _release(step)
            del step  # the slower one's memory goes to the next
        found = ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in times.items())
        print(f"execution: {best.name} (ms a step: {found}){unfit}", file=sys.stderr)
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


def _release(step: Step | None) -> None:
    """Peers that were stacked have their weights to themselves again."""
    inner = getattr(step, "inner", step)
    if isinstance(inner, StackedStep):
        inner.release()


class CpuAutoStep(AutoStep):
    """The step that is chosen runs on the threads that are chosen; torch's number is the caller's
    again afterwards.

    names: the executions to choose from, with their number of threads; a single one is made at
    once. threads: the only number to consider.
    copies: see `Rehearsal`. unfit: executions that were left out, with the reason. by_rule: why
    nothing can be measured.
    """

    def __init__(
        self,
        names: Sequence[str],
        make: Callable[[str], EagerStep],
        peers: Sequence[nn.Module],
        *,
        threads: int | None,
        copies: Callable[[], Callable[[str], EagerStep]],
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
        choice = self.choose(*batch)
        with cpus.threads(choice.threads):
            try:
                return self.chosen(*batch)
            except InputError as error:
                if len(self.names) == 1 or choice.execution == "eager":
                    raise
                return self._without(choice.execution, error, batch)

    def choose(self, *batch: Tensor) -> Choice:
        """What this step runs as, from now on; chooses where that is still open."""
        if self.choice is None:
            found = candidates(self.names, len(self.peers), self.threads)
            if self.by_rule:
                self.choice = self._choice(self._rule(found, batch))
                self._say(f"by rule: {self.by_rule}", self.unfit)
            elif len(found) == 1:
                self.choice = self._choice(found[0])
                if self.unfit:
                    self._say(None, self.unfit)
            else:
                self.choice = self._measured(found, batch)
            if self.chosen is None:
                self._make_chosen()
        return self.choice

    def _make_chosen(self) -> None:
        name = self.choice.execution
        try:
            self.chosen = self.make(name)
        except InputError as error:
            if name == "eager":
                raise
            self._take_eager(self.make("eager"), {name: str(error)})

    def _rule(self, found: Sequence[Candidate], batch: tuple[Tensor, ...]) -> Candidate:
        for candidate in found:
            if candidate.execution == "threads":
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
            self.choice = self._choice(self._rule(same, batch))
            self._say(f"by rule: {error}")
            return self.choice
        best = fastest(rehearsal.times)
        self.seconds = rehearsal.times[best]
        eager = {c: t for c, t in rehearsal.times.items() if c.execution == "eager"}
        self.choice = self._choice(best, fastest(eager).threads if eager else None)
        took = [f"{c} {1000 * t:.1f}" for c, t in rehearsal.times.items()]
        took += [f"{c} given up" for c in rehearsal.late]
        self._say(f"ms a step: {', '.join(took)}", {**self.unfit, **rehearsal.unfit})
        return self.choice

    def _choice(self, found: Candidate, elsewhere: int | None = None) -> Choice:
        """Elsewhere the user's own number; or what was measured; or the peers' share, since threads
        that do not wait for each other say nothing of those that do."""
        share = found.threads
        if found.execution == "threads":
            share = max(1, found.threads // len(self.peers))
        return Choice(*found, self.threads or elsewhere or share)

    def _without(self, name: str, error: InputError, batch: tuple[Tensor, ...]) -> StepOutput:
        """Eager from here on, unless that fails as well; a refused step has changed nothing."""
        step = self.make("eager")
        output = step(*batch)
        self._take_eager(step, {name: str(error)})
        return output

    def _take_eager(self, step: EagerStep, unfit: dict[str, str]) -> None:
        self.chosen, self.choice = step, self.choice._replace(execution="eager")
        self._say(None, unfit)

    def _say(self, how: str | None, unfit: dict[str, str] | None = None) -> None:
        execution, threads, _ = self.choice
        how = f" ({how})" if how else ""
        reasons = "".join(
            f"; not {name}: {_brief(name, why)}" for name, why in (unfit or {}).items()
        )
        print(f"execution: {execution}, {count_of_threads(threads)}{how}{reasons}", file=sys.stderr)


def _brief(name: str, reason: str) -> str:
    """A refusal without what goes without saying here."""
    return re.sub(r"; use [\w ]+$", "", reason.removeprefix(f"execution {name!r} "))


def unfit_for_threads(peers: Sequence[nn.Module]) -> str | None:
    """What might come out otherwise where peers run side by side; their first step proves that they
    draw no random numbers."""
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


def hooked(peers: Sequence[nn.Module]) -> bool:
    """Whether anything of the caller's is called in a pass."""
    return (
        hooks_on_all_modules()
        or any(hooked_module(m) for p in peers for m in p.modules())
        or any(hooked_tensor(w) for p in peers for w in p.parameters())
    )


def only_by_rule(peers: Sequence[nn.Module], compiled: bool) -> str | None:
    """Why a measurement on copies would not do."""
    if compiled or any(hasattr(m, "_orig_mod") for p in peers for m in p.modules()):
        return "compiled peers would be compiled anew for each candidate"
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if together or any(map(replicated, peers)):
        return "several processes might choose differently"
    if hooked(peers):
        return "hooks would be called by what is measured"
    return None
