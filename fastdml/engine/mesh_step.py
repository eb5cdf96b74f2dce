"""The training step on a mesh of ranks: each trains the peers of its row on its column's share of
the batch.

A part of the batch: receptions are posted, the local peers run, the logits of each leave when its
forward pass ends, and the loss, which has the logits of all K peers, computes gradients for the
local ones alone. It costs the forward passes, the exchange of the last local peer, and the backward
passes. With accumulate of 2 or more the parts are pipelined: part i's logits travel while part i+1
runs forward, so that the exchange hides where it is shorter than a part's forward passes.

torch's generators are seeded by (seed, peer, step, part) for each forward pass of a peer and put
back behind it, 3 microseconds of a CPU: what a peer draws (dropout) does not depend on which peers
run beside it, nor on the mesh, of which the parts of a batch are `accumulate` a column.

A mesh of one rank runs the same code and communicates with nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.engine.amp import Amp
from fastdml.engine.eager import EagerStep, Outputs, WithFeatures, widened
from fastdml.engine.execution import (
    EXECUTIONS,
    Builder,
    ExecutionName,
    Step,
    StepOptions,
    StepOutput,
    UpdateOrder,
)
from fastdml.engine.streams import StreamsStep
from fastdml.engine.update import NOTHING_TRAINED
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.parallel.exchange import Exchange, Kind, Transfer
from fastdml.parallel.global_means import GlobalMeans, check_loss
from fastdml.parallel.mesh import Mesh
from fastdml.parallel.remote_peer import RemotePeer
from fastdml.parallel.replicas import Replicas
from fastdml.parallel.shards import is_sharded

if TYPE_CHECKING:
    from fastdml.cohort import Cohort


class Part(NamedTuple):
    """A part of the batch after its forward passes, its logits under way."""

    outputs: list[Outputs]  # of the K peers, () of those elsewhere, and of the teachers
    labels: Tensor
    transfer: Transfer


class MeshStep(EagerStep):
    """What steps of any execution do on a mesh. `number`: of steps begun, which seeds what peers
    draw; a run that resumes sets it. The output is this column's share (`parallel.total` adds the
    columns'); what it says of peers elsewhere is not to be used."""

    mesh: Mesh

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        mesh = self.options.mesh
        assert mesh is not None
        self.mesh, self.local = mesh, mesh.local
        self.exchange = Exchange(mesh)
        self.remote = self.exchange.remote
        self.number = 0
        self.part = 0  # of the whole batch's, the one that runs
        self.transfer: Transfer | None = None  # of that part
        self.dtypes: dict[int, torch.dtype] = {}  # in which the logits of each peer travel
        self.agreed = False  # whether all ranks know them

    def networks(self) -> list[nn.Module]:
        assert self.options.mesh is not None
        wrap = (lambda peer: peer) if self.options.metric is None else WithFeatures
        self.replicas = Replicas(self.cohort, self.options.mesh, wrap)
        return self.replicas.networks

    def refresh(self) -> None:
        if self.replicas.refresh(self.update.refresh()):
            self.forwards[: self.learning] = self.replicas.networks

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        mesh, parts = self.mesh, self.options.accumulate
        batches = self.parts_of(images, labels)
        whole = parts == mesh.data == 1
        means = None if whole else GlobalMeans(self.loss, labels, mesh, parts)
        found: list[StepOutput] = []
        waiting: Part | None = None
        with self.replicas.unsynchronised() if parts > 1 else nullcontext():
            for i, (x, y) in enumerate(batches):
                self.part = mesh.column * parts + i
                part = self.forwarded(x, y)
                if waiting is not None:
                    found.append(self.finished(waiting, means.loss if means else self.loss))
                waiting = part
        assert waiting is not None
        if parts > 1:
            self.replicas.synchronise()
        found.append(self.finished(waiting, means.loss if means else self.loss))
        self.replicas.check()
        output = StepOutput(*means.whole(found)) if means else found[0]
        self.update.apply(self.local)
        self.number += 1
        return self.of_peers(output)

    def forwarded(self, images: Tensor, labels: Tensor) -> Part:
        """Runs the local peers and the teachers; the peers' logits leave as each is done."""
        if not self.agreed:
            return self._first(images, labels)
        self.transfer = self.exchange.begin(self._kinds(len(labels)))
        return Part(self.outputs(images), labels, self.transfer)

    def finished(self, part: Part, loss: MutualLoss) -> StepOutput:
        """The losses of a part whose forward passes are done, and the local peers' backward."""
        received = {k: widened(z) for k, z in part.transfer.wait().items()}
        logits = [out[0].detach() if out else received[k] for k, out in enumerate(part.outputs)]
        students = self.local if self.remote or self.teachers else None
        losses, stats, grads = self.logit_grads(logits, part.labels, loss, students)
        local = [part.outputs[k] for k in self.local]
        self.backward(local, [(grads[k],) for k in self.local])
        return StepOutput(losses, stats)

    # ---- forward passes

    def run(self, k: int, images: Tensor) -> Outputs:
        """Of a local peer or a teacher as ever; of a peer elsewhere nothing."""
        if k >= self.learning:
            return super().run(k, images)
        if k not in self.local:
            return ()
        with seeded((self.options.seed, k, self.number, self.part), images.device):
            out = super().run(k, images)
        dtype = self.dtypes.setdefault(k, out[0].dtype)
        if out[0].dtype != dtype:
            raise InputError(
                f"peer {self.cohort.names[k]} gives logits of {out[0].dtype}, and at the first "
                f"step gave {dtype}, which other ranks expect: make a new step"
            )
        if self.transfer is not None:
            self.transfer.give(k, out[0])
        return out

    def _kinds(self, rows: int) -> dict[int, Kind]:
        shape = (rows, self.cohort.num_classes)
        return {k: Kind(shape, self.dtypes[k]) for k in self.remote}

    def _first(self, images: Tensor, labels: Tensor) -> Part:
        """The first part of the first step: nothing travels before all ranks know that all peers
        give logits, and in which dtype. Raises InputError on every rank where one cannot go on."""
        self.transfer, outputs, failed = None, [], None
        try:
            outputs = self.outputs(images)
        except Exception as error:
            failed = error
        own = {k: str(self.dtypes[k]).removeprefix("torch.") for k in self.local if not failed}
        trains = any(w.requires_grad for ws in self.update.holdings.weights for w in ws)
        told = self.mesh.gather(
            {"failed": _brief(failed), "own": [*own.items()], "rows": len(labels), "any": trains}
        )
        if failed is not None:
            raise failed
        self._take(told)
        self.transfer = self.exchange.begin(self._kinds(len(labels)))
        for k in self.local:  # fp16 was widened, which this undoes exactly
            self.transfer.give(k, outputs[k][0].to(self.dtypes[k]))
        return Part(outputs, labels, self.transfer)

    def _take(self, told: list[dict[str, Any]]) -> None:
        """Takes in what every rank said of its first step."""
        mesh = self.mesh
        for rank, of_rank in enumerate(told):
            if of_rank["failed"]:
                raise InputError(f"{of_rank['failed']} (on rank {rank})")
        if not any(of_rank["any"] for of_rank in told):
            raise InputError(NOTHING_TRAINED)
        column = range(mesh.column, mesh.world, mesh.data)
        rows = {rank: told[rank]["rows"] for rank in column}
        if len({*rows.values()}) > 1:
            each = ", ".join(f"rank {rank} {n}" for rank, n in rows.items())
            raise InputError(
                f"ranks whose peers learn from each other take the same batch, and got other "
                f"numbers of rows: {each}"
            )
        self.dtypes = {k: getattr(torch, name) for rank in column for k, name in told[rank]["own"]}
        self.agreed = True


def _brief(error: Exception | None) -> str:
    """An error in one line; "" for none."""
    if error is None or isinstance(error, InputError):
        return str(error or "")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class MeshEagerStep(MeshStep):
    name: ExecutionName = "eager"


class MeshStreamsStep(MeshStep, StreamsStep):
    name: ExecutionName = "streams"


ON_A_MESH: dict[str, Builder] = {"eager": MeshEagerStep, "streams": MeshStreamsStep}


def mesh_step(
    execution: ExecutionName,
    update: UpdateOrder,
    threads: int | None,
    cohort: Cohort,
    loss: MutualLoss,
    optimizer: Optimizer,
    amp: Amp,
    options: StepOptions,
) -> Step:
    """The step of this execution on `options.mesh`. Raises InputError for what does not go with
    one."""
    mesh = options.mesh
    assert mesh is not None
    check_loss(loss)
    if len(mesh.rows) != len(cohort) or any(
        isinstance(peer, RemotePeer) == (k in mesh.local) for k, peer in enumerate(cohort)
    ):
        raise InputError(
            "the cohort's peers are not where the mesh has placed them: call "
            "mesh.distribute(cohort) on every rank first"
        )
    if update != "simultaneous":
        raise InputError(
            f"update={update!r} updates one peer after the other, for which ranks would wait: on a "
            "mesh use simultaneous"
        )
    if options.compile:
        raise InputError("compile does not go with a mesh: leave it out")
    if threads:
        raise InputError(
            f"threads={threads} does not go with a mesh: set OMP_NUM_THREADS, as torchrun does"
        )
    on_cuda = amp.device.type == "cuda"
    able = [name for name in ON_A_MESH if on_cuda or "cpu" in EXECUTIONS[name].devices]
    where = f"a mesh on {amp.device.type}"
    if any(map(is_sharded, cohort.peers)):  # FSDP2 has streams of its own
        able, where = ["eager"], "peers that are sharded"
    name = execution
    if execution == "auto":
        name = "streams" if "streams" in able else "eager"
    if name not in able:
        raise InputError(
            f"execution {execution!r} does not go with {where}: use {' or '.join(able)}"
        )
    if options.exchange_every < 1:
        raise InputError(f"exchange_every must be 1 or more, not {options.exchange_every!r}")
    return ON_A_MESH[name](cohort, loss, optimizer, amp, options)


@contextmanager
def seeded(key: tuple[int, int, int, int], device: torch.device) -> Iterator[None]:
    """Within it torch's generators, the host's and the device's, draw what belongs to `key`: (seed,
    peer, step, part). Behind it they go on as if nothing had been drawn."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    before = [g.get_state() for g in generators]
    for g in generators:
        g.manual_seed(seed)
    try:
        yield
    finally:
        for g, state in zip(generators, before, strict=True):
            g.set_state(state)
