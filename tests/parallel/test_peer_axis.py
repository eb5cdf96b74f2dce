"""Peers on different ranks train as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import STEPS, C, N, cohort, train, weights
from ranks import run_ranks

from fastdml.parallel import make_mesh


def on_ranks(peer: int, K: int) -> dict[str, Any]:
    mesh = make_mesh(peer)
    peers = cohort(K)
    outputs, step = train(peers, mesh)
    return {
        "local": mesh.local,
        "weights": weights(peers),
        "losses": torch.stack([o.losses for o in outputs]),
        "stats": torch.stack([o.stats.packed for o in outputs]),
        "sent": step.exchange.sent,
        "received": step.exchange.received,
    }


@pytest.mark.parametrize(("peer", "K"), [(2, 2), (2, 5), (4, 4), (4, 6)])
def test_unequal_peers_train_bit_for_bit_as_in_one_process(peer, K):
    alone = cohort(K)
    outputs, _ = train(alone)
    whole = weights(alone)
    losses = torch.stack([o.losses for o in outputs])
    for rank in run_ranks(peer, on_ranks, peer, K):
        assert rank["weights"]
        for name, t in rank["weights"].items():
            assert torch.equal(t, whole[name]), name
        local = [*rank["local"]]
        assert torch.equal(rank["losses"][:, local], losses[:, local])
        assert rank["sent"] == STEPS * len(local) * N * C * 8
        assert rank["received"] == STEPS * (K - len(local)) * N * C * 8
