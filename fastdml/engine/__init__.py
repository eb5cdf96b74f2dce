"""One training step over a cohort, in several executions behind one call.

    eager     one peer after the other, launch by launch
    threads   a host thread a peer; on a CPU only
    streams   a CUDA stream a peer
    graph     the step of `streams` captured as one CUDA graph
    stacked   peers of one architecture as one network; on CUDA captured as one graph too

Each is a file that registers a small class (`execution.register_execution`). Of the other files
here, `update`, `amp`, `optimizers` and `ema` are shared by them, `auto` and `rehearsal` choose one,
and `guards`, `stackable` and `stack_proof` check that one is safe. `mesh_step` is the step on
several ranks, and `mesh_executions` says which of these there are for it.
"""

from __future__ import annotations

# Each of these registers an execution.
from fastdml.engine import eager, graph, sequential, stacked, streams, threads  # noqa: F401
from fastdml.engine.amp import Amp
from fastdml.engine.ema import Ema
from fastdml.engine.execution import Step, StepOutput, executions, register_execution
from fastdml.engine.optimizers import Schedule, learning_rates, make_optimizer

from fastdml.engine.make_step import make_step  # isort: skip  # the function, not its module

__all__ = [
    "Amp",
    "Ema",
    "Schedule",
    "Step",
    "StepOutput",
    "executions",
    "learning_rates",
    "make_optimizer",
    "make_step",
    "register_execution",
]
