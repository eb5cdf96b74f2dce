"""How many rows and columns the mesh of a run has, where the settings leave it open or the number
of ranks has changed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastdml.errors import InputError
from fastdml.parallel import Mesh, auto_sizes, make_mesh
from fastdml.parallel.placement import refitted
from fastdml.parallel.processes import own_device, own_rank, start, started, world_size
from fastdml.train.checkpoint_reading import run_part
from fastdml.train.config.mesh_sizes import MeshSizes, read_mesh
from fastdml.train.config.sources import load_config
from fastdml.train.run_folder import resume_folder
from fastdml.yaml_file import CONFIG

if TYPE_CHECKING:
    from fastdml.train.config.base import TrainConfig

logger = logging.getLogger(__name__)

FIRST = "mesh"  # that a job began with, in the launcher's store


def sizes_of(config: TrainConfig, K: int) -> MeshSizes:
    """Those that the settings name. Of "auto" those with which the run began; of a new run what
    suits K peers of equal cost, until their times are measured. Where the number of ranks is
    another than at the beginning, those that fit it. Raises InputError where none do."""
    sizes, accumulate = config.mesh_sizes or MeshSizes(), config.accumulate
    auto, begun = config.mesh == "auto", started() and _attempt(config) > 0
    if auto:
        sizes = MeshSizes(*auto_sizes(world_size(), [1.0] * K))
        before = settings_before(config)
        if before and before.mesh_sizes:
            sizes, accumulate, begun = before.mesh_sizes, before.accumulate, True
        elif first := _first(config):
            sizes, begun = first, True
    world = world_size()
    if sizes.processes == world or not begun:
        return sizes
    parts = 0 if config.sync_batchnorm else accumulate * sizes.data
    found = MeshSizes(*refitted(*sizes, world, K, parts))
    if own_rank() == 0:
        logger.info("%d ranks go on where %d were: mesh %s", world, sizes.processes, found)
    return found


def rows_before(config: TrainConfig, K: int, peer: int) -> list[int] | None:
    """The row of each of K peers in the newest checkpoint of a run that goes on, so that what ranks
    keep of their own stays theirs; None of a new run, and where it had not `peer` rows."""
    if settings_before(config) is None:
        return None
    rows = (run_part(resume_folder(config)) or {}).get("rows")
    fits = isinstance(rows, list) and len(rows) == K and {*rows} == {*range(peer)}
    return rows if fits else None


def settings_before(config: TrainConfig) -> TrainConfig | None:
    """Those of the run that is to go on, where there is one; what is wrong is said later."""
    if not config.resume:
        return None
    try:
        return load_config(resume_folder(config) / CONFIG)
    except InputError:
        return None


def remember(mesh: Mesh) -> None:
    """Keeps the sizes for ranks that the launcher starts again, on the lead."""
    if mesh.job_store is not None:
        mesh.job_store.compare_set(FIRST, "", str(MeshSizes(mesh.peer, mesh.data)))


def measured(mesh: Mesh, costs: list[float] | None) -> Mesh:
    """The mesh with which a step should take the least time, which may be this one, with the peers
    placed. costs: seconds of each on a whole batch, on rank 0; None where they are alike. All ranks
    call it."""
    costs = mesh.share(costs)
    if costs is None:
        return mesh
    sizes = MeshSizes(*auto_sizes(mesh.world, costs))
    if sizes != (mesh.peer, mesh.data):
        mesh = make_mesh(*sizes, timeout=mesh.timeout, device=mesh.device)
    mesh.place(len(costs), costs)
    if mesh.lead:
        logger.info("mesh %s, by the peers' measured times; rows of the peers: %s", sizes,
                    " ".join(map(str, mesh.rows)))  # fmt: skip
    return mesh


def _attempt(config: TrainConfig) -> int:
    return start(own_device(config.device), config.timeout).attempt


def _first(config: TrainConfig) -> MeshSizes | None:
    """The sizes that ranks of an earlier attempt began with."""
    if not started():
        return None
    store = start(own_device(config.device), config.timeout).job_store
    if store is None or not store.check([FIRST]):
        return None
    return read_mesh(store.get(FIRST).decode())
