"""The interface of an execution of the training step, and the registry of executions.

A step computes the losses of a batch, the gradients of all peers and the update of their weights.
How it does that on the device is its execution: one peer after the other, a stream a peer, one
CUDA graph. An execution is a file that registers a class or a function under a name:

    @register_execution("eager")
    class EagerStep: ...

`make_step` finds it by that name, and "auto" measures it beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.engine.amp import Amp
from fastdml.engine.ema import Ema
from fastdml.engine.update import Update
from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.metric_losses import MetricLoss
    from fastdml.parallel import Mesh

ExecutionName = Literal["auto", "eager", "threads", "streams", "graph", "stacked"]
UpdateOrder = Literal["simultaneous", "sequential"]
ExchangeName = Literal["logits", "weights"]  # what peers on different ranks learn from


class StepOutput(NamedTuple):
    """Device tensors; reading one waits for the step to finish."""

    losses: Tensor  # (K,), metric losses included
    stats: MutualStats
    metric: Tensor | None = None  # (K,), where the step has a metric loss
    # (M, K), where there are M teachers: T**2 KL(teacher || peer), mean over rows
    teacher_kl: Tensor | None = None

    def of_peers(self, K: int) -> StepOutput:
        """Of a step's figures for K peers and the teachers behind them those of the peers alone."""
        pairs = self.stats.pairwise_kl
        return self._replace(
            losses=self.losses[:K], stats=self.stats.of_first(K), teacher_kl=pairs[K:, :K]
        )


class After(Protocol):
    """A caller's function at the end of each step. It works on the device alone, since it may
    become part of a CUDA graph, and is then called only while the graph is captured."""

    def __call__(self, output: StepOutput, update: Update) -> None: ...

    def tensors(self) -> list[Tensor]:
        """The tensors that it changes, the same ones at each call."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What every execution understands; the meaning of each is documented at `make_step`."""

    compile: bool = False
    grad_clip: float | None = None
    accumulate: int = 1
    ema: Ema | None = None
    assemble: Callable[..., tuple[Tensor, Tensor]] | None = None
    after: After | None = None
    metric: MetricLoss | None = None
    output: Callable[[Any], Tensor] | None = None
    taught: Callable[[Tensor], list[Tensor] | None] | None = None
    mesh: Mesh | None = None
    exchange: ExchangeName = "logits"
    exchange_every: int = 1
    seed: int = 0


class Step(Protocol):
    """A training step: `step(images, labels)`, or what `assemble` takes."""

    name: ExecutionName  # of its execution
    cohort: Cohort
    loss: MutualLoss
    update: Update
    failure: str | None  # why it runs as a slower execution, once that is known

    def __call__(self, *batch: Tensor) -> StepOutput: ...

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes."""

    def release(self) -> None:
        """Undoes what the step did to the peers' memory, since another step takes its place."""

    def rehearse(self) -> None:
        """Called before steps on copies of the peers whose results nobody uses, to time them:
        checks that take time may be left out."""


Builder = Callable[["Cohort", MutualLoss, Optimizer, Amp, StepOptions], Step]
Registered = TypeVar("Registered", bound=Callable[..., Step])


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What `make_step` and "auto" know of an execution."""

    name: ExecutionName
    devices: tuple[str, ...] = ("cpu", "cuda")
    turn: int = 100  # executions are listed and measured in this order, from the simplest
    thread_a_peer: bool = False  # divides torch's threads among peers and teachers
    moves_weights: bool = False  # into memory of its own, once it has proved that this is right
    keeps_addresses: bool = False  # of weights, which may not move afterwards
    # Why these networks, peers and then teachers, should not run so, in words; None: they may.
    unfit: Callable[[Sequence[nn.Module]], str | None] = lambda networks: None
    builders: dict[UpdateOrder, Builder] = field(default_factory=dict)  # what it can do


EXECUTIONS: dict[str, Execution] = {}


def register_execution(
    name: str, *, update: UpdateOrder = "simultaneous", **facts: Any
) -> Callable[[Registered], Registered]:
    """Makes a class or function that builds steps, called with (cohort, loss, optimizer, amp,
    options), an execution of this name.

    update: the order in which it updates the peers; an execution that knows both registers twice,
        and gives the facts with the first.
    facts: fields of `Execution`.

    Raises ValueError where the name has such an execution already.
    """

    def register(build: Registered) -> Registered:
        if facts or name not in EXECUTIONS:
            if name in EXECUTIONS:
                raise ValueError(f"execution {name!r} is registered already")
            # Type checkers know the names of this package alone.
            EXECUTIONS[name] = Execution(name=cast("ExecutionName", name), **facts)
        builders = EXECUTIONS[name].builders
        if update in builders:
            raise ValueError(f"execution {name!r} with update={update!r} is registered already")
        builders[update] = build
        return build

    return register


def in_turn() -> list[Execution]:
    """All executions in the order of `turn`, from the simplest."""
    return sorted(EXECUTIONS.values(), key=lambda execution: execution.turn)


def executions(device: torch.device) -> list[ExecutionName]:
    """Those that run on this kind of device."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    return [execution.name for execution in in_turn() if kind in execution.devices]
