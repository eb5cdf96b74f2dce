"""What the peers of a column tell each other: a tensor a peer, from the rank that has the peer to
the ranks of the other rows.

Each tensor travels as one asynchronous broadcast in the group of its peer, so that the numbers of
peers a rank may differ. On gloo all receptions are posted first, and a tensor leaves as soon as it
is there. On NCCL an operation occupies the device while it waits, and operations of several
communicators must be queued in one order on all ranks: there the first peers of all rows travel
first, in the order of the rows, then the second ones, and so on.

Nothing here makes the host wait on CUDA: a broadcast waits for the stream that is current when it
is posted, and `wait` makes the current stream wait for the broadcasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh


class Kind(NamedTuple):
    """What a rank must know of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Exchange:
    """Sends and receives along the mesh's peer axis. `sent`: bytes that this rank's peers gave, a
    broadcast counted once; `received`: bytes of the other rows' peers."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.sent = self.received = 0
        self.in_rounds = dist.get_backend(mesh.peers_group) == "nccl"
        self.remote = tuple(k for k in range(len(mesh.rows)) if k not in mesh.local)

    def begin(self, kinds: Mapping[int, Kind], peers: Sequence[int] | None = None) -> Transfer:
        """One tensor of every peer, or of these, is about to travel. kinds: of the other rows'
        tensors."""
        return Transfer(self, kinds, range(len(self.mesh.rows)) if peers is None else peers)

    def rounds(self, peers: Sequence[int]) -> list[list[int]]:
        """The peers in the order in which rounds take them: one a row that still has some."""
        rows = self.mesh.rows
        own = [[k for k in peers if rows[k] == r] for r in range(self.mesh.peer)]
        return [[ks[i] for ks in own if i < len(ks)] for i in range(max(map(len, own)))]


class Transfer:
    """A tensor of every peer under way: `give` each local one, then `wait` for the others'."""

    def __init__(self, exchange: Exchange, kinds: Mapping[int, Kind], peers: Sequence[int]) -> None:
        self.exchange, device = exchange, exchange.mesh.device
        self.tensors: dict[int, Tensor] = {}
        self.remote = [k for k in exchange.remote if k in peers]
        for k in self.remote:
            shape, dtype = kinds[k]
            self.tensors[k] = torch.empty(shape, dtype=dtype, device=device)
        self.works: list[dist.Work] = []
        self.to_give = sum(k in exchange.mesh.local for k in peers)
        self.rounds = exchange.rounds(peers) if exchange.in_rounds else []
        if not exchange.in_rounds:
            for k in self.remote:
                self._post(k)
        self._remaining_rounds()

    def give(self, k: int, tensor: Tensor) -> None:
        """Sends the tensor of local peer k, which stays as it is until `wait`. Local peers give in
        their order."""
        if self.exchange.mesh.peer == 1:
            return
        self.tensors[k] = tensor.detach().contiguous()
        self.to_give -= 1
        if not self.exchange.in_rounds:
            self._post(k)
            return
        self._next_round()
        self._remaining_rounds()

    def wait(self) -> dict[int, Tensor]:
        """The tensors of the other rows' peers by their numbers. The current stream, on a CPU the
        caller, waits for all that is under way."""
        for work in self.works:
            work.wait()
        self.works = []
        return {k: self.tensors[k] for k in self.remote}

    def _remaining_rounds(self) -> None:
        """Of rows with more peers than this one: they come before any other transfer."""
        while self.rounds and not self.to_give:
            self._next_round()

    def _next_round(self) -> None:
        for k in self.rounds.pop(0):
            self._post(k)

    def _post(self, k: int) -> None:
        exchange, tensor = self.exchange, self.tensors[k]
        if k in exchange.mesh.local:
            exchange.sent += tensor.nbytes
        else:
            exchange.received += tensor.nbytes
        group = exchange.mesh.peer_group_of(k)
        work = dist.broadcast(tensor, exchange.mesh.owner(k), group=group, async_op=True)
        assert work is not None  # this rank is in the group
        self.works.append(work)
