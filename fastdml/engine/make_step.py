"""`make_step` builds a training step over a cohort: it checks what it is given, and finds the
execution that was asked for, or lets one be chosen.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastdml.engine import cpus
from fastdml.engine.amp import Amp, AmpName, resolve_amp
from fastdml.engine.apex import takes_number
from fastdml.engine.auto import CpuAutoStep, CudaAutoStep, only_by_rule
from fastdml.engine.ema import Ema
from fastdml.engine.execution import (
    EXECUTIONS,
    After,
    ExchangeName,
    ExecutionName,
    Step,
    StepOptions,
    UpdateOrder,
    executions,
    in_turn,
)
from fastdml.engine.mesh_executions import mesh_step
from fastdml.engine.optimizers import check_optimizer
from fastdml.engine.rehearsal import Uncopyable
from fastdml.engine.weights import check_weights
from fastdml.errors import InputError
from fastdml.parallel.remote_peer import RemotePeer

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.loss import MutualLoss
    from fastdml.metric_losses import MetricLoss
    from fastdml.parallel import Mesh


logger = logging.getLogger(__name__)


def make_step(
    cohort: Cohort,
    loss: MutualLoss,
    optimizer: Optimizer,
    *,
    execution: ExecutionName = "auto",
    amp: AmpName | Amp = "auto",
    compile: bool = False,
    update: UpdateOrder = "simultaneous",
    grad_clip: float | None = None,
    accumulate: int = 1,
    ema: Ema | None = None,
    assemble: Callable[..., tuple[Tensor, Tensor]] | None = None,
    after: After | None = None,
    metric: MetricLoss | None = None,
    threads: int | None = None,
    output: Callable[[Any], Tensor] | None = None,
    taught: Callable[[Tensor], list[Tensor] | None] | None = None,
    mesh: Mesh | None = None,
    exchange: ExchangeName = "logits",
    exchange_every: int = 1,
    seed: int = 0,
) -> Step:
    """A training step: `step(images, labels) -> StepOutput(losses, stats, metric)`.

    images: what the peers take, (N, ...) on the cohort's device. labels: (N,) int64 or int32.
    The output's tensors are on the device too, float32 (float64 where the peers give that): losses
    (K,), or (K, N) with the loss's reduction "none"; statistics (`MutualStats`); metric (K,), None
    without a metric loss; teacher_kl (M, K), None without teachers. A step never waits for the
    device; reading its output does.

    A cohort's M teachers run once a step, and the loss is called with the logits of the K peers and
    then theirs: `peer_weights` are (K + M, K + M). Their own losses are not in the output, and no
    gradient is computed for them.

    execution: "eager", "threads" (on a CPU), "streams", "graph" (on CUDA), "stacked", or "auto":
        the one that a short measurement at the first step finds fastest, on a CPU together with the
        number of threads, in one line on stderr. By a rule, so that runs repeat bit for bit, where
        torch's deterministic algorithms are on; eager for an optimizer of Apex that counts on the
        host.
    amp: "auto", "off", "bf16", "fp16" or a resolved `Amp`.
    compile: the networks go through torch.compile first.
    update: "simultaneous" or "sequential" (the paper's Algorithm 1; eager and graph only).
    grad_clip: largest norm of one peer's gradient.
    accumulate: parts of equal size that a batch is computed in: less memory, and BatchNorm sees the
        parts. Gradients, losses and statistics are those of the whole batch, also where rows have
        no label.
    ema: averages that follow every step.
    assemble: makes (images, labels) from what the step is called with, as `ResidentLoader.assemble`
        does from an index; in a graph it is captured too, and only the index is copied.
    after: called with the step's output and `step.update` at its end; captured too.
    metric: a loss on the peers' features, added to the other; peers need a head (`ReidHead`).
    threads: torch's number of threads during a step on a CPU; before and after it the number is the
        caller's. 0: OMP_NUM_THREADS where it is set, else measured at the first step, for a named
        execution too. None: 0 for "auto"; a named execution takes torch's number as it finds it.
    output: picks the logits (N, C) from what a peer returns in training, such as
        `lambda out: out.logits` for models of Hugging Face, where it is more than the logits; not
        with execution="stacked" or a metric loss. For evaluation wrap such a peer instead.

    taught: gives the logits (N, C) of each teacher, computed before, from one more argument of the
        step, behind all others: such as the numbers (N,) of the batch's images. Where it gives
        None, the teachers run. In a graph it is captured too.
    mesh: ranks that share the peers and the batch, `fastdml.parallel.make_mesh`; all ranks make the
        step and call it, each on its column's share. The cohort has been distributed. "auto" is
        eager on a CPU and streams on CUDA; compile, threads, stacked and sequential updates are
        refused. The output is the column's share, whose sum over the columns is the whole batch's,
        and right for the peers that are here. Gradients that weights have before a step count as
        the column's share too. Peers may be sharded (`fastdml.parallel.shard`), and then run eager.
        After a step that failed between ranks no other one is taken: all start anew.
    exchange, exchange_every: on a mesh, what peers on different rows learn from. "logits": those of
        the same batch; of n > 1, the KL term exists at every n-th step only and nothing travels at
        the others. "weights": copies of the other rows' peers, run by every row, whose weights are
        fetched every n steps (codistillation: Anil et al. 2018, arXiv 1804.03235).
    seed: on a mesh, of what peers draw in a forward pass, such as dropout: a function of it, the
        peer, the step and the part of the batch.

    Each step takes the groups of the optimizer and the peers' layers as they are: weights that are
    unfrozen, groups that are added and layers that are replaced train from the next step on. Those
    that no group holds stay as they are, with a warning; after a step no weight has a gradient.

    Raises InputError, which names the value and the remedy: for an execution, amp or update that
    does not exist or does not go with this device or the other options; for teachers of other
    classes, or of images that the peers' cannot be made into; for weights that no step
    can change (on the meta device, of lazy layers, inference tensors, without a mesh shards); for
    an optimizer that needs a closure or sparse gradients; for a metric loss and peers that do not
    fit together.
    The step itself raises it where peers return something else than logits (N, C), where a batch
    does not split into `accumulate` parts, where nothing is trained, under `torch.no_grad()`, and
    where a named execution does not go with these peers.
    """
    check_weights(cohort, shards=mesh is not None)
    check_optimizer(optimizer)
    _check_loss(loss)
    for teacher in cohort.teachers:
        teacher.match(cohort.record())
    device = next(cohort.parameters()).device
    _check_update(update, accumulate)
    if metric is not None:
        _check_metric(cohort, metric, device, accumulate, output)
    if execution != "auto" and mesh is None:
        _check_execution(execution, update, device)
    options = StepOptions(
        compile=compile,
        grad_clip=grad_clip,
        accumulate=accumulate,
        ema=ema,
        assemble=assemble,
        after=after,
        metric=metric,
        output=output,
        taught=taught,
        mesh=mesh,
        exchange=exchange,
        exchange_every=exchange_every,
        seed=seed,
    )
    amp = resolve_amp(amp, device) if isinstance(amp, str) else amp
    if mesh is not None:
        return mesh_step(execution, update, threads, cohort, loss, optimizer, amp, options)
    return _chosen(Maker(cohort, loss, optimizer, amp, options, update), execution, threads, device)


def _chosen(
    make: Maker, execution: ExecutionName, threads: int | None, device: torch.device
) -> Step:
    """The step of the execution that was named, or one that chooses."""
    optimizer, update = make.optimizer, make.update
    if execution != "auto" and (threads is None or device.type != "cpu"):
        return make(execution)
    if execution == "auto" and takes_number(optimizer):
        logger.info("execution: eager (%s counts on the host)", type(optimizer).__name__)
        return make("eager")
    if device.type != "cuda":
        return _on_a_cpu(make, execution, threads or cpus.asked())
    if torch.are_deterministic_algorithms_enabled():
        return make("eager")
    return CudaAutoStep(_able(device, update), make, device)


def _on_a_cpu(make: Maker, execution: ExecutionName, threads: int | None) -> CpuAutoStep:
    """Chooses the execution where that is "auto", and the number of threads where that is None."""
    networks = [*make.cohort.peers, *make.cohort.teachers]
    by_rule = only_by_rule(networks, make.options.compile)
    unfit: dict[str, str] = {}
    able: list[ExecutionName]
    if execution != "auto":
        able = [execution]
        by_rule = None if threads else by_rule  # nothing is left to choose
    elif by_rule or len(networks) == 1:
        able = ["eager"]
    else:
        able = _able(torch.device("cpu"), make.update)
        reasons = {name: EXECUTIONS[name].unfit(networks) for name in able}
        unfit |= {name: reason for name, reason in reasons.items() if reason is not None}
        able = [name for name in able if name not in unfit]
    if torch.are_deterministic_algorithms_enabled() and (len(able) > 1 or not threads):
        by_rule = "deterministic"
    return CpuAutoStep(
        able, make, networks, threads=threads, copies=make.on_copies, unfit=unfit, by_rule=by_rule
    )


def _able(device: torch.device, update: UpdateOrder) -> list[ExecutionName]:
    """The executions that can update in this order on this device."""
    return [name for name in executions(device) if update in EXECUTIONS[name].builders]


@dataclass(frozen=True)
class Maker:
    """Builds steps of any execution. Unlike a function's, its copies build steps of copies."""

    cohort: Cohort
    loss: MutualLoss
    optimizer: Optimizer
    amp: Amp
    options: StepOptions
    update: UpdateOrder

    def __call__(self, name: ExecutionName) -> Step:
        arguments = (self.cohort, self.loss, self.optimizer, self.amp, self.options)
        return EXECUTIONS[name].builders[self.update](*arguments)

    def on_copies(self) -> Callable[[ExecutionName], Step]:
        """Builds steps that do the same work and touch nothing of the caller's, nor do they learn.

        Raises Uncopyable where they cannot be copied."""
        own = self.cohort, self.optimizer, self.amp, self.options.metric
        held = _held(self.cohort, self.optimizer)
        frozen = {id(teacher): teacher for teacher in self.cohort.teachers}  # nothing changes them
        try:
            cohort, optimizer, amp, metric = copy.deepcopy(own, frozen)
        except Exception as error:  # of the peers' own code, or out of memory
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Uncopyable(f"peers or optimizer cannot be copied: {reason}") from None
        if _held(cohort, optimizer) != held:  # a peer's own __deepcopy__ may do this
            raise Uncopyable("a copy of the optimizer holds other weights than a copy of the peers")
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * 0
        options = dataclasses.replace(self.options, ema=None, after=None, metric=metric)
        make = Maker(cohort, self.loss, optimizer, amp, options, self.update)

        def rehearsed(name: ExecutionName) -> Step:
            step = make(name)
            step.rehearse()
            return step

        return rehearsed


def _held(cohort: Cohort, optimizer: Optimizer) -> int:
    """How many of the peers' weights the optimizer holds."""
    own = {id(w) for w in cohort.parameters()}
    return sum(id(w) in own for group in optimizer.param_groups for w in group["params"])


def _check_loss(loss: MutualLoss) -> None:
    options = getattr(loss, "options", None)  # a loss of the caller's may have none
    if getattr(options, "students", None) is not None:
        raise InputError(
            "a step trains every peer: leave students out of the loss, and give networks that only "
            "teach as the cohort's teachers"
        )


def _check_update(update: str, accumulate: int) -> None:
    if update not in ("simultaneous", "sequential"):
        raise InputError(f"update must be simultaneous or sequential, not {update!r}")
    if accumulate < 1:
        raise InputError(f"accumulate must be 1 or more, not {accumulate!r}")
    if update == "sequential" and accumulate > 1:
        raise InputError(
            "accumulate does not go with update='sequential', which needs the predictions on the "
            "whole batch at hand: use simultaneous, or a smaller batch"
        )


def _check_execution(execution: str, update: UpdateOrder, device: torch.device) -> None:
    if execution not in EXECUTIONS:
        known = ", ".join(e.name for e in in_turn())
        raise InputError(f"execution {execution!r} does not exist; use auto or {known}")
    if execution not in executions(device):
        able = " or ".join(executions(device))
        needs = "a CUDA device" if EXECUTIONS[execution].devices == ("cuda",) else "a CPU"
        raise InputError(f"execution {execution!r} needs {needs}, not {device}: use {able}")
    if update not in EXECUTIONS[execution].builders:
        able = " or ".join(e.name for e in in_turn() if update in e.builders)
        raise InputError(
            f"execution {execution!r} does not go with update={update!r}, one peer after the "
            f"other: use {able}"
        )


def _check_metric(
    cohort: Cohort,
    metric: MetricLoss,
    device: torch.device,
    accumulate: int,
    output: Callable[[Any], Tensor] | None,
) -> None:
    if output is not None:
        raise InputError("output= does not go with a metric loss, whose peers give what it needs")
    if accumulate > 1:
        raise InputError(
            f"accumulate={accumulate} does not go with a metric loss, which compares the images of "
            "the whole batch: use accumulate=1"
        )
    here = {k: p for k, p in enumerate(cohort.peers) if not isinstance(p, RemotePeer)}
    for k, peer in here.items():
        if not hasattr(peer, "logits_and_features"):
            raise InputError(
                f"peer {cohort.names[k]} gives no features for a metric loss: build the cohort "
                "with head=ReidHead()"
            )
    dims = tuple(getattr(peer, "num_features", None) for peer in here.values())
    same = len(metric.dims) == len(cohort) and dims == tuple(metric.dims[k] for k in here)
    if None not in dims and not same:
        raise InputError(
            f"the metric loss is for peers of {metric.dims} features, and the cohort's have {dims}"
        )
    for t in metric.tensors():
        if t.device != device:
            raise InputError(
                f"the metric loss's centres are on {t.device}, the cohort on {device}: move them "
                "with metric.to(device)"
            )
