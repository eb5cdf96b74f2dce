"""The mesh ("peer", "data") of ranks, its groups, and which peers are where.

Groups are made in one order by all ranks, each with the mesh's timeout: that of init_process_group
does not reach the groups that are made later.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastdml.errors import InputError
from fastdml.parallel import ending, placement, processes
from fastdml.parallel.failure import Whereabouts
from fastdml.parallel.remote_peer import RemotePeer

if TYPE_CHECKING:
    from fastdml.cohort import Cohort


def make_mesh(
    peer: int = 1,
    data: int = 1,
    *,
    timeout: float = 300.0,
    device: str | torch.device | None = None,
) -> Mesh:
    """A mesh of `peer` rows and `data` columns over the ranks that torchrun started.

    Starts torch.distributed, NCCL for CUDA and gloo for CPUs, unless the caller has. Without a
    launcher this process is a mesh of one. All ranks call it.

    timeout: seconds after which a rank that waits for another gives up, in every group.
    device: of this rank, by default the GPU with its number on its machine, or the CPU.

    Raises InputError where peer * data is not the number of ranks, or a GPU is missing.
    """
    for name, value in (("peer", peer), ("data", data)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    if not (math.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout must be a positive number of seconds, not {timeout!r}")
    world = processes.world_size()
    if peer * data != world:
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        raise InputError(
            f"a mesh peer={peer},data={data} takes {peer * data} ranks, and this job has {ranks}: "
            f"torchrun --nproc-per-node {peer * data} starts as many on one machine"
        )
    own = processes.own_device(device)
    return Mesh(peer, data, own, timeout, processes.start(own, timeout))


class Mesh:
    """Ranks as rows that share the peers and columns that share a batch; `make_mesh` makes it.

    peer, data: the numbers of rows and columns. row, column: of this rank; rank = row * data +
    column, of `world`. lead: whether this is rank 0. local_rank, local_world: the number of this
    rank among those of its machine, and theirs. device, timeout: as given.
    device_mesh: torch's, with the dimensions "peer" and "data".
    whereabouts: of each rank. store, job_store, attempt: as of `processes.Job`.
    control: a gloo group of all ranks, for flags and small objects on the CPU.
    peers_group, data_group: the ranks of the own column and of the own row, for what belongs to no
    peer. After `place`: rows, the row of each of the K peers; local, the numbers of the own ones.
    """

    def __init__(
        self, peer: int, data: int, device: torch.device, timeout: float, job: processes.Job
    ) -> None:
        self.peer, self.data = peer, data
        self.groups: list[dist.ProcessGroup] = []  # all that were made and that this rank is in
        ending.hold(self)
        self.store, self.job_store, self.attempt = job
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.row, self.column = divmod(self.rank, data)
        self.device, self.timeout = device, timeout
        self.lead = self.rank == 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.control = self._group(range(self.world), "gloo")
        self.whereabouts = [Whereabouts(*own) for own in self.gather(Whereabouts.own())]
        self.peers_group = self._along_peers()
        rows = [self._along_data(row) for row in range(peer)]
        self.data_group = cast("dist.ProcessGroup", rows[self.row])
        self.device_mesh = DeviceMesh.from_group(
            [self.peers_group, self.data_group],
            device.type,
            torch.arange(self.world).view(peer, data),
            mesh_dim_names=("peer", "data"),
        )
        self.rows: tuple[int, ...] = ()
        self.local: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()  # of all peers, once a cohort is distributed
        self._peer_groups: list[dist.ProcessGroup] = []
        self._data_groups: list[dist.ProcessGroup | None] = []

    def __repr__(self) -> str:
        return f"Mesh(peer={self.peer}, data={self.data}, rank {self.rank} on {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        return self  # a copy of a cohort is on the same ranks

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a mesh belongs to the processes of its ranks and cannot be pickled, nor can what "
            "knows it, such as a cohort on it: save the cohort's state_dict()"
        )

    # ---- peers

    def place(self, K: int, costs: Sequence[float] | None = None) -> None:
        """Gives each of K peers a row, and makes its groups. All ranks call it.

        costs: of a step of each peer, in any unit: rows then get equal work, as near as it goes,
        instead of equal numbers of peers. Those of rank 0 count.
        Raises InputError for more rows than peers. Called again, it only changes what differs.
        """
        self.put(placement.place(K, self.peer, self.share(costs and [*costs])))

    def put(self, rows: tuple[int, ...]) -> None:
        """As `place`, where the row of each peer is known."""
        if rows == self.rows:
            return
        self.rows = rows
        self.local = tuple(k for k, row in enumerate(rows) if row == self.row)
        self._peer_groups, self._data_groups = [], []
        for row in rows:
            self._peer_groups.append(self._along_peers())
            self._data_groups.append(self._along_data(row))

    def peer_group_of(self, k: int) -> dist.ProcessGroup:
        """The ranks of the own column, in a group for peer k alone."""
        return self._peer_groups[k]

    def data_group_of(self, k: int) -> dist.ProcessGroup | None:
        """The ranks that hold peer k, in a group for it alone; None where it is not local."""
        return self._data_groups[k]

    def owner(self, k: int) -> int:
        """The rank of the own column that holds peer k."""
        return self.rows[k] * self.data + self.column

    def distribute(self, cohort: Cohort, *, keep: bool = False) -> dict[int, nn.Module]:
        """Puts a `RemotePeer` in the place of each peer that is not local, and returns the peers
        that were there by their numbers. All ranks have built the same cohort and call it; peers
        that nothing has placed are placed. keep: steps that exchange weights copy these peers."""
        for name, peer in zip(cohort.names, cohort, strict=True):
            if not isinstance(peer, RemotePeer) and next(peer.parameters(), None) is None:
                raise InputError(
                    f"peer {name} has no parameters, and a mesh shares out peers that train: leave "
                    "it out, or train without a mesh"
                )
        if len(self.rows) != len(cohort):
            self.place(len(cohort))
        self.names = tuple(cohort.names)
        taken = {}
        for k, peer in enumerate(cohort):
            if k not in self.local and not isinstance(peer, RemotePeer):
                size = sum(p.numel() for p in peer.parameters())
                taken[k] = peer
                cohort.peers[k] = RemotePeer(
                    cohort.names[k], cohort.models[k], size, self.rows[k], peer if keep else None
                )
        cohort.mesh = self
        return taken

    def collect(self, cohort: Cohort, taken: Mapping[int, nn.Module]) -> None:
        """Puts peers that `distribute` took back, with the weights that column 0 has trained. All
        ranks call it."""
        for k, row in enumerate(self.rows):
            peer = taken.get(k, cohort.peers[k])
            for value in peer.state_dict(keep_vars=True).values():
                if isinstance(value, Tensor):
                    self._broadcast(value, row * self.data)
            cohort.peers[k] = peer
        cohort.mesh = None

    def _broadcast(self, value: Tensor, source: int) -> None:
        """Gives all ranks the values of one rank, in place."""
        buffer = value.detach().to(self.device).contiguous()
        dist.broadcast(buffer, source)
        if self.rank != source:
            with torch.no_grad():
                value.copy_(buffer)

    # ---- small objects

    def new_control(self) -> dist.ProcessGroup:
        """Another gloo group of all ranks, for a thread that talks while others do. All ranks call
        it."""
        return self._group(range(self.world), "gloo")

    def new_row_control(self) -> dist.ProcessGroup:
        """As `new_control`, of the own row."""
        rows = [range(row * self.data, (row + 1) * self.data) for row in range(self.peer)]
        return [self._group(ranks, "gloo") for ranks in rows][self.row]

    def share(self, value: Any, group: dist.ProcessGroup | None = None) -> Any:
        """What rank 0 gave, on every rank: plain values, which go through JSON. All ranks call it,
        and the others' values do not matter. group: of `new_control`, by default `control`."""
        group = group or self.control
        text = json.dumps(value if self.lead else None).encode()
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0, group=group)
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.lead:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(data, 0, group=group)
        return json.loads(data.numpy().tobytes())

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """What every rank gave, in their order, on all: plain values, which go through JSON. group:
        as of `share`."""
        group = group or self.control
        text = json.dumps(value).encode()
        sizes = [torch.tensor([0]) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=group)
        longest = max(map(int, sizes))
        data = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        all_data = [torch.empty_like(data) for _ in range(self.world)]
        dist.all_gather(all_data, data, group=group)
        return [json.loads(d.numpy().tobytes()) for d in all_data]

    # ---- groups

    def _along_peers(self) -> dist.ProcessGroup:
        columns = [range(c, self.world, self.data) for c in range(self.data)]
        return [self._group(ranks) for ranks in columns][self.column]

    def _along_data(self, row: int) -> dist.ProcessGroup | None:
        group = self._group(range(row * self.data, (row + 1) * self.data))
        return group if row == self.row else None

    def _group(self, ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
        """All ranks call it for every group, whether they belong to it or not, in one order."""
        limit = datetime.timedelta(seconds=self.timeout)
        backend = backend or processes.backend_of(self.device)
        group = cast("dist.ProcessGroup", dist.new_group(list(ranks), limit, backend))
        if self.rank in ranks:
            self.groups.append(group)
        return group
