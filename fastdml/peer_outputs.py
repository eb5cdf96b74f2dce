"""What peers give to other programs: logits, features of a re-identification head, and of several
peers the ensemble's probabilities or features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.names import advice


def has_head(peer: nn.Module) -> bool:
    """Whether it has a re-identification head. Both methods: networks of all kinds have an `embed`
    that means something else."""
    return all(callable(getattr(peer, name, None)) for name in ("embed", "logits_and_features"))


class Embedding(nn.Module):
    """A peer with a re-identification head, called for its features (N, D)."""

    def __init__(self, peer: Any) -> None:  # an nn.Module
        super().__init__()
        self.peer = peer

    def forward(self, images: Tensor) -> Tensor:
        return self.peer.embed(images)


class Ensemble(nn.Module):
    """Images -> the mean of the peers' probabilities, (N, C) float32."""

    def __init__(self, peers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([peer(images).float().softmax(1) for peer in self.peers]).mean(0)


class FeatureEnsemble(nn.Module):
    """Images -> the peers' features side by side, (N, sum of D_k) of unit length, each of unit
    length first so that none outweighs the others."""

    def __init__(self, peers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    def forward(self, images: Tensor) -> Tensor:
        peers: Iterable[Any] = self.peers
        parts = [F.normalize(peer.embed(images).float(), dim=1) for peer in peers]
        return F.normalize(torch.cat(parts, dim=1), dim=1)


def full_precision(peer: nn.Module) -> nn.Module:
    """`peer` itself, its weights of fewer than 32 bits made float32, in which images are given."""
    values = [*peer.parameters(), *peer.buffers()]
    if any(v.is_floating_point() and v.element_size() < 4 for v in values):
        peer.float()
    return peer


def peer_numbers(names: Sequence[str], peer: str | int) -> list[int]:
    """The numbers of the peers that `peer` means: "ensemble", a name, or a number from 0 on as an
    int or text. Raises InputError, with the nearest name."""
    if peer == "ensemble":
        return list(range(len(names)))
    if peer in names:
        return [list(names).index(str(peer))]
    if isinstance(peer, int) or (isinstance(peer, str) and peer.isascii() and peer.isdigit()):
        if isinstance(peer, bool) or not 0 <= int(peer) < len(names):
            raise InputError(
                f"there is no peer {peer}: numbers run from 0 to {len(names) - 1}, for "
                f"{', '.join(names)}"
            )
        return [int(peer)]
    raise InputError(f"there is no peer {peer!r}; {advice(str(peer), [*names, 'ensemble'])}")
