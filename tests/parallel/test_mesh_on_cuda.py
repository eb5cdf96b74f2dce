"""Steps on a mesh of CUDA devices are those of one process.

With one device: a mesh of one rank on NCCL, captured too, and two ranks that share the device over
gloo, where streams and what they wait for are as on NCCL, but for the broadcast itself. With two
devices: NCCL between them, captured too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import batch, cohort
from ranks import run_ranks
from torch import Tensor

from fastdml import MutualLoss
from fastdml.engine import make_optimizer, make_step
from fastdml.parallel import Mesh, make_mesh, processes

pytestmark = pytest.mark.gpu
K, STEPS = 3, 8
Trained = tuple[dict[str, Tensor], str | None]


def trained(mesh: Mesh | None, **options: Any) -> Trained:
    """Weights, and why a graph was not captured."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    peers = cohort(K, torch.float32)
    if mesh is not None:
        mesh.distribute(peers, keep=options.get("exchange") == "weights")
        options["mesh"] = mesh
    peers = peers.to("cuda")
    optimizer = make_optimizer(peers, lr=0.1)
    options = {"execution": "eager", "amp": "off", **options}
    step = make_step(peers, MutualLoss(temperature=2.0), optimizer, **options)
    for i in range(STEPS):
        x, y = batch(i, torch.float32)
        if mesh is not None:
            x, y = (t.chunk(mesh.data)[mesh.column] for t in (x, y))
        step(x.cuda(), y.cuda())
    return {n: w.detach().cpu() for n, w in peers.named_parameters()}, step.failure


CASES: dict[str, dict[str, Any]] = {
    "eager": {},
    "streams": {"execution": "streams"},
    "streams in parts": {"execution": "streams", "accumulate": 2},
    "copies": {"execution": "streams", "exchange": "weights"},
}
GRAPHS: dict[str, dict[str, Any]] = {
    "graph": {"execution": "graph"},
    "graph in parts": {"execution": "graph", "accumulate": 2},
    "graph of copies": {"execution": "graph", "exchange": "weights"},
}


def on_ranks(peer: int, data: int, cases: dict[str, dict[str, Any]], shared: bool) -> Any:
    if shared:
        processes.own_device = lambda device=None: torch.device("cuda", 0)
        processes.backend_of = lambda device: "gloo"
    mesh = make_mesh(peer, data, timeout=60)
    return {name: trained(mesh, **options) for name, options in cases.items()}


def alone(parts: int) -> dict[str, Tensor]:
    return trained(None, accumulate=parts)[0]


def check(ranks: list[dict[str, Trained]], cases: dict[str, dict[str, Any]], data: int) -> None:
    for name, options in cases.items():
        whole = run_ranks(1, alone, options.get("accumulate", 1) * data)[0]
        seen: set[str] = set()
        for rank in ranks:
            weights, failure = rank[name]
            assert failure is None, name
            seen |= {*weights}
            for n, w in weights.items():
                torch.testing.assert_close(
                    w,
                    whole[n],
                    rtol=1e-4,
                    atol=1e-5,
                    msg=lambda how, case=f"{name}: {n}": f"{case}: {how}",
                )
        assert seen == {*whole}


def test_one_rank():
    cases = CASES | GRAPHS
    check(run_ranks(1, on_ranks, 1, 1, cases, False, timeout=120), cases, 1)


def test_two_rows_that_share_a_device():
    check(run_ranks(2, on_ranks, 2, 1, CASES, True, timeout=120), CASES, 1)


def test_two_columns_that_share_a_device():
    check(run_ranks(2, on_ranks, 1, 2, CASES, True, timeout=120), CASES, 2)


@pytest.mark.parametrize(("peer", "data"), [(2, 1), (1, 2)])
def test_two_devices(peer, data):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    cases = CASES | GRAPHS
    check(run_ranks(2, on_ranks, peer, data, cases, False, timeout=300), cases, data)
