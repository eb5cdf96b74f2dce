"""Measures, on copies, which execution on how many threads is fastest on a CPU.

Copies of peers, optimizer and metric loss take a few steps on the first batch with a learning rate
of 0; nothing of the caller's is touched, the random generators included. Candidates are every
execution on one thread, on a thread a peer, and on all (`cpus.most`).

Noise: candidates take turns, and the median of each counts. In order of simplicity (eager before
threads before stacked, few threads before many), a later candidate must save the share `MARGIN` of
a step.

Cost: at most `ROUNDS` rounds, which begin within `BUDGET` seconds or, for a slow model, within the
time of `STEPS` steps. For a slow model each candidate takes one step, stacking is not tried, and a
pass on one thread is given up after `PATIENCE` seconds. A candidate that falls far behind is
dropped, in the middle of a pass if need be: threads that wait for each other while other processes
hold the cores may need seconds for a step of milliseconds.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdml.engine import cpus
from fastdml.engine.execution import EXECUTIONS, ExecutionName, Step
from fastdml.engine.guards import Generators
from fastdml.errors import InputError

ROUNDS = 5
BUDGET = 1.5  # seconds, or this many of the fastest steps:
STEPS = 8
PATIENCE = 1.0  # seconds
FIRST_LATE, LATE = 4.0, 3.0  # times the fastest of the others: in a first step, and later
GRACE = 0.2  # seconds that a first step may take in any case
MARGIN = 0.1  # share of a step
INFINITY = float("inf")


class Candidate(NamedTuple):
    execution: ExecutionName
    threads: int  # torch's, around the step

    def __str__(self) -> str:
        return f"{self.execution} on {self.threads}"


def candidates(
    executions: Sequence[ExecutionName], peers: int, threads: int | None = None
) -> list[Candidate]:
    """In order of simplicity. threads: the only number of them to consider."""
    most = cpus.most()
    counts = [threads] if threads else sorted({1, min(peers, most), most})
    found = []
    for execution in sorted(executions, key=lambda name: EXECUTIONS[name].turn):
        usable = counts
        if EXECUTIONS[execution].thread_a_peer:
            # Numbers of threads that give a peer the same share are one candidate.
            shares = {n // peers: n for n in reversed(counts) if n >= peers}
            usable = sorted(shares.values()) or counts[-1:] * (len(executions) == 1)
        found += [Candidate(execution, n) for n in usable]
    return found


def fastest(times: dict[Candidate, float], margin: float = MARGIN) -> Candidate:
    """The first, in order of simplicity, that takes not much more than the fastest."""
    best = min(times.values())
    return next(c for c, seconds in times.items() if (1 - margin) * seconds <= best)


class Late(Exception):
    """Ends a pass that takes too long."""


class Uncopyable(RuntimeError):
    """Something that steps change cannot be copied; the message says why."""


class Rehearsal:
    """Measures how long each candidate's step takes. `copies()` copies all that steps change and
    gives what builds a step of some execution on them; stacking, which moves tensors, gets copies
    of its own.

    After `run`, `times` has the seconds a step in order of simplicity, `late` those given up, and
    `unfit` the executions that do not fit, with the reason.
    """

    def __init__(
        self, copies: Callable[[], Callable[[ExecutionName], Step]], batch: tuple[Tensor, ...]
    ) -> None:
        self.copies, self.batch = copies, batch
        self.builders: dict[bool, Callable[[ExecutionName], Step]] = {}
        self.steps: dict[str, Step] = {}
        self.times: dict[Candidate, float] = {}
        self.late: list[Candidate] = []
        self.unfit: dict[str, str] = {}
        self.deadline = INFINITY  # of the pass in progress

    def run(self, found: Sequence[Candidate]) -> None:
        self.simplest = found[0].execution
        generators = Generators(torch.device("cpu"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the step that is chosen says it again
                self._rounds(found)
        finally:
            generators.restore()
            self.steps.clear()
            self.builders.clear()

    def _rounds(self, found: Sequence[Candidate]) -> None:
        started = time.perf_counter()

        def over(steps: int = 0) -> bool:
            longest = max(BUDGET, steps * min(self.times.values(), default=0.0))
            return time.perf_counter() - started > longest

        more = any(c.threads > found[0].threads for c in found)
        for candidate in found:
            limit = max(GRACE, FIRST_LATE * self._best_but(candidate))
            proves = EXECUTIONS[candidate.execution].moves_weights
            if candidate == found[0] and more:
                limit = PATIENCE
            elif proves:
                if over() or Candidate("eager", candidate.threads) in self.late:
                    continue
                limit = INFINITY  # its first step begins with the proof
            if self._step(candidate, limit) is not None and (proves or not over()):
                del self.times[candidate]  # the first step is slower
                self._step(candidate, LATE * self._best_but(candidate))
        taken: dict[Candidate, list[float]] = {candidate: [] for candidate in self.times}
        for _ in range(ROUNDS):
            if over(STEPS) or len(self.times) == 1:
                break
            for candidate in list(self.times):
                seconds = self._step(candidate, LATE * self._best_but(candidate))
                if seconds is not None:
                    taken[candidate].append(seconds)
                    self.times[candidate] = statistics.median(taken[candidate])

    def _best_but(self, candidate: Candidate) -> float:
        return min((t for c, t in self.times.items() if c != candidate), default=INFINITY)

    def _step(self, candidate: Candidate, limit: float) -> float | None:
        """Seconds of one step; the first go into `times`. None where the candidate is given up: it
        takes longer than `limit` and others do not, or does not fit."""
        execution, threads = candidate
        if execution in self.unfit:
            return None
        try:
            step = self._made(execution)
            with cpus.threads(threads):
                started = time.perf_counter()
                self.deadline = started + limit
                step(*self.batch)
                seconds = time.perf_counter() - started
        except Late:
            seconds = INFINITY
        except (InputError, RuntimeError) as error:
            if execution == self.simplest:
                raise  # the mistake is not the execution's: all of them would fail
            self.unfit[execution] = " ".join(str(error).split())
            self.times = {c: t for c, t in self.times.items() if c.execution != execution}
            return None
        if seconds > limit and (seconds == INFINITY or self._best_but(candidate) < INFINITY):
            self.late.append(candidate)
            self.times.pop(candidate, None)
            return None
        self.times.setdefault(candidate, seconds)
        return seconds

    def _made(self, execution: ExecutionName) -> Step:
        if execution not in self.steps:
            moves = EXECUTIONS[execution].moves_weights
            fresh = moves not in self.builders
            if fresh:
                self.builders[moves] = self.copies()
            self.steps[execution] = step = self.builders[moves](execution)
            if fresh and not moves:  # peers with hooks cannot be stacked
                for module in step.cohort.modules():
                    module.register_forward_pre_hook(self._heed)
        return self.steps[execution]

    def _heed(self, *call: object) -> None:
        if time.perf_counter() > self.deadline:
            raise Late
