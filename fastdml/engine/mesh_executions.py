"""Which executions of a step there are on a mesh of ranks, and what does not go with one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from fastdml.engine.amp import Amp
from fastdml.engine.execution import (
    EXECUTIONS,
    Builder,
    ExecutionName,
    Step,
    StepOptions,
    UpdateOrder,
)
from fastdml.engine.mesh_graph import graph_on_a_mesh
from fastdml.engine.mesh_step import MeshEagerStep, MeshStreamsStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.parallel.batch_norm import GroupBatchNorm
from fastdml.parallel.global_means import check_loss
from fastdml.parallel.remote_peer import RemotePeer
from fastdml.parallel.shards import is_sharded

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

ON_A_MESH: dict[str, Builder] = {
    "eager": MeshEagerStep,
    "streams": MeshStreamsStep,
    "graph": graph_on_a_mesh,
}


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
    _check_exchange(cohort, options)
    return ON_A_MESH[name](cohort, loss, optimizer, amp, options)


def _check_exchange(cohort: Cohort, options: StepOptions) -> None:
    if options.exchange not in ("logits", "weights"):
        raise InputError(f"exchange must be logits or weights, not {options.exchange!r}")
    if options.exchange_every < 1:
        raise InputError(f"exchange_every must be 1 or more, not {options.exchange_every!r}")
    if options.exchange == "logits" or not any(isinstance(p, RemotePeer) for p in cohort):
        return
    if any(map(is_sharded, cohort.peers)):
        raise InputError(
            "exchange='weights' copies whole peers to every rank, and these are sharded: use logits"
        )
    if any(isinstance(m, GroupBatchNorm) for m in cohort.modules()):
        raise InputError(
            "exchange='weights' runs copies of peers, whose BatchNorm sees one column's share of a "
            "batch: leave sync_batchnorm out, or use exchange='logits'"
        )
