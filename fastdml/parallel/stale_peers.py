"""Copies of the other rows' peers, for ranks that exchange weights in place of logits.

Every n steps each rank sends the weights and buffers of its peers, as one broadcast a peer and
dtype, and runs the copies on its own batches: codistillation (Anil et al. 2018, arXiv 1804.03235;
Sodhani et al. 2020, arXiv 2010.02838). A step then pays the forward passes of all K peers. A copy
runs as its original does, in training mode and with what it would draw, so that with n = 1 the
steps are those that exchange logits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.parallel.exchange import Exchange, Kind, Transfer
from fastdml.parallel.remote_peer import RemotePeer

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.parallel.mesh import Mesh


class StalePeers:
    """`copies`: the other rows' peers by their numbers, frozen. Raises InputError where a peer's
    module was not kept (`Mesh.distribute(cohort, keep=True)`)."""

    def __init__(self, cohort: Cohort, mesh: Mesh, exchange: Exchange) -> None:
        self.exchange, self.mesh = exchange, mesh
        self.stand_ins: dict[int, RemotePeer] = {}
        self.copies: dict[int, nn.Module] = {}
        self.networks: list[nn.Module] = []  # of all K peers, the local ones themselves
        self.names = cohort.names
        self.fetched = False  # whether the copies hold weights that were trained
        for k, peer in enumerate(cohort):
            if isinstance(peer, RemotePeer):
                self.stand_ins[k] = peer
                self.copies[k] = _copied(peer).to(mesh.device)
            self.networks.append(self.copies.get(k, peer))
        self.shapes = {k: _shapes(self.networks[k]) for k in mesh.local}

    def follow(self) -> None:
        """Copies are in training mode where their cohort is."""
        for k, peer in self.copies.items():
            training = self.stand_ins[k].training
            if peer.training != training:
                peer.train(training)

    @torch.no_grad()
    def fetch(self) -> None:
        """The copies get the weights and buffers that their peers have now. Raises InputError
        where a local peer has others than its copies have."""
        for k, shapes in self.shapes.items():
            if _shapes(self.networks[k]) != shapes:
                raise InputError(
                    f"peer {self.names[k]} has other weights than when the step was made, of which "
                    "other ranks keep copies: make a new step on every rank"
                )
        tensors = [_by_dtype(network) for network in self.networks]
        transfers: dict[torch.dtype, Transfer] = {}
        # A peer without tensors of a dtype sends none, which the others know from its copy.
        for dtype in sorted({d for own in tensors for d in own}, key=str):
            some = [k for k, own in enumerate(tensors) if dtype in own]
            sizes = {k: sum(t.numel() for t in tensors[k][dtype]) for k in some}
            kinds = {k: Kind((sizes[k],), dtype) for k in some if k in self.copies}
            transfers[dtype] = self.exchange.begin(kinds, peers=some)
            for k in some:
                if k in self.mesh.local:
                    flat = torch.cat([t.detach().reshape(-1) for t in tensors[k][dtype]])
                    transfers[dtype].give(k, flat)
        for dtype, transfer in transfers.items():
            for k, flat in transfer.wait().items():
                own = tensors[k][dtype]
                parts = flat.split([t.numel() for t in own])
                for t, part in zip(own, parts, strict=True):
                    t.copy_(part.view(t.shape))
        self.fetched = True

    def state_dict(self) -> dict[str, Any]:
        """The copies as they are, by the peers' numbers."""
        return {str(k): peer.state_dict() for k, peer in self.copies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Without a state of the same peers the copies are fetched anew at the next step."""
        self.fetched = {*state} == {str(k) for k in self.copies}
        if self.fetched:
            for k, peer in self.copies.items():
                peer.load_state_dict(state[str(k)])


def _copied(stand_in: RemotePeer) -> nn.Module:
    original = stand_in.original
    if original is None:
        raise InputError(
            f"to exchange weights each rank needs a copy of peer {stand_in.peer_name}: call "
            "mesh.distribute(cohort, keep=True)"
        )
    try:
        return copy.deepcopy(original).requires_grad_(False)
    except Exception as error:  # of the peer's own code
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"peer {stand_in.peer_name} cannot be copied, which exchange='weights' needs: {reason}"
        ) from None


def _by_dtype(network: nn.Module) -> Mapping[torch.dtype, list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for t in [*network.parameters(), *network.buffers()]:
        found.setdefault(t.dtype, []).append(t)
    return found


def _shapes(network: nn.Module) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in [*network.parameters(), *network.buffers()]]
