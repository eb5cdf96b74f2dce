"""Peers on different ranks train as in one process, bit for bit, and what travels is their logits
alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import STEPS, C, N, batch, cohort, network, train, weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdml import Cohort, MutualLoss
from fastdml.engine import Ema
from fastdml.engine.amp import Amp, LossScale
from fastdml.errors import InputError
from fastdml.parallel import Mesh, make_mesh, sync_batchnorm

CPU = torch.device("cpu")
K, FEW = 5, 3  # peers, three on the first of two ranks; steps where many tell no more
PEER_WEIGHTS = torch.rand(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of_dtypes() -> Cohort:
    """Peers in float32, but for one, and logits of four dtypes."""
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
    return Cohort([As(network(k, 4 + k).float(), kind) for k, kind in enumerate(kinds)], C)


class As(nn.Module):
    """A network whose logits are of this dtype."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).to(self.dtype)


def taught() -> Cohort:
    peers = cohort(K)
    peers.teachers = [network(20, 8), network(21, 6)]
    return peers


def frozen() -> Cohort:
    """The second rank has frozen peers alone."""
    peers = cohort(K)
    for k in (1, 3, 4):
        peers[k].requires_grad_(False)
    return peers


def overflowing() -> Cohort:
    """In float16 the gradients of peers 0 and 4 overflow, while those of the others do not."""
    peers = cohort(K, torch.float32)
    with torch.no_grad():
        for k in (0, 4):
            peers[k][-1].weight.mul_(30)
    return peers


CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": STEPS},
    "accumulate": {"accumulate": 2},
    "accumulate 4": {"accumulate": 4},
    "clipped Adam": {"optimizer": "adam", "grad_clip": 0.05},
    "bf16": {"make": lambda: cohort(K, torch.float32), "amp": "bf16", "accumulate": 2},
    "fp16": {"make": overflowing, "amp": "fp16", "steps": 2},
    "dtypes": {"make": of_dtypes},
    "teachers": {"make": taught},
    "frozen": {"make": frozen},
    "peer weights": {"loss": {"peer_weights": PEER_WEIGHTS, "gate": "confidence"}},
    "gradients into teachers": {"loss": {"detach_targets": False}},
    "each row's loss": {"loss": {"reduction": "none"}},
    "averages": {"ema": 0.9},
    "rounds": {"rounds": True, "accumulate": 2},
}


def run(mesh: Mesh | None, case: dict[str, Any]) -> dict[str, Any]:
    case = {"steps": FEW, **case}
    peers = case.pop("make", lambda: cohort(K))()
    rounds, decay = case.pop("rounds", False), case.pop("ema", None)
    if mesh is not None:
        mesh.distribute(peers)
    if decay:
        case["ema"] = Ema(peers, decay)
    if case.get("amp") == "fp16":
        case["amp"] = Amp(CPU, torch.float16, LossScale(CPU, init=2.0**16))
    loss = MutualLoss(**{"temperature": 2.0, **case.pop("loss", {})})
    outputs, step = train(peers, mesh, loss=loss, rounds=rounds, **case)
    found = {
        "weights": weights(peers),
        "losses": torch.stack([o.losses for o in outputs]),
        "pairs": torch.stack([o.stats.pairwise_kl for o in outputs]),
        "averages": {} if decay is None else case["ema"].state_dict(),
        "skipped": step.update.overflow,
        "scale": None if step.amp.scaler is None else step.amp.scaler.scale,
        "taught": None if outputs[0].teacher_kl is None else outputs[-1].teacher_kl,
    }
    if mesh is not None:
        found |= {"local": mesh.local, "sent": step.exchange.sent, "got": step.exchange.received}
    return found


def on_ranks(names: list[str]) -> dict[str, Any]:
    mesh = make_mesh(2, timeout=30)
    return {name: run(mesh, CASES[name]) for name in names} | {"calls": collectives(mesh)}


class Counting(TorchDispatchMode):
    """Notes every collective that is handed to a backend, and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            tensors = {id(t): t for t in tree_leaves(args[0]) if isinstance(t, Tensor)}
            size = sum(t.nbytes for t in tensors.values())
            self.found.append((func._schema.name.removeprefix("c10d::"), size))
        return func(*args, **(kwargs or {}))


def collectives(mesh: Mesh) -> dict[str, list[tuple[str, int]]]:
    """Of the second step, without and with parts, in fp16, and without an exchange."""
    found = {}
    for name, options in {
        "plain": {},
        "parts": {"accumulate": 2},
        "fp16": {"amp": "fp16"},
        "seldom": {"exchange_every": 2},
    }.items():
        if name == "fp16":
            options = {"amp": Amp(CPU, torch.float16, LossScale(CPU))}
        peers = cohort(K, torch.float32)
        _, step = train(peers, mesh, steps=1, **options)
        with Counting() as counted:
            step(*batch(1, torch.float32))
        found[name] = sorted(counted.found)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_ranks, [*CASES])


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_bit_for_bit_as_one_process(two_ranks, name):
    alone = run(None, CASES[name])
    seen = set()
    for rank in two_ranks:
        found, local = rank[name], [*rank[name]["local"]]
        seen |= {*local}
        assert {n.split(".")[1] for n in found["weights"]} == {str(k) for k in local}
        for key in ("weights", "averages"):
            for n, t in found[key].items():
                assert torch.equal(t, alone[key][n]), n
        assert torch.equal(found["losses"][:, local], alone["losses"][:, local])
        assert torch.equal(found["pairs"][:, :, local], alone["pairs"][:, :, local])
        for key in ("skipped", "scale"):
            assert (found[key] is None) == (alone[key] is None)
            assert found[key] is None or torch.equal(found[key], alone[key])
        if found["taught"] is not None:
            assert torch.equal(found["taught"][:, local], alone["taught"][:, local])
    assert seen == {*range(K)}
    assert bool(alone["averages"]) == ("ema" in CASES[name])


def test_overflow_in_fp16_is_of_some_peers(two_ranks):
    for rank in two_ranks:
        assert rank["fp16"]["skipped"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_only_logits_travel_in_their_dtype(two_ranks):
    sizes = {name: [8] * K for name in CASES}
    sizes |= {"bf16": [2] * K, "fp16": [2] * K, "dtypes": [4, 8, 2, 2, 4]}
    for rank in two_ranks:
        for name in CASES:
            found = rank[name]
            steps = CASES[name].get("steps", FEW)
            own = sum(sizes[name][k] for k in found["local"])
            assert found["sent"] == steps * N * C * own, name
            assert found["got"] == steps * N * C * (sum(sizes[name]) - own), name


def test_nothing_but_logits_is_handed_to_the_backend(two_ranks):
    for rank in two_ranks:
        calls = rank["calls"]
        assert calls["plain"] == [("broadcast_", N * C * 4)] * K
        assert calls["parts"] == [("broadcast_", N // 2 * C * 4)] * 2 * K
        assert calls["fp16"] == [("allreduce_", K * 4)] + [("broadcast_", N * C * 2)] * K
        assert calls["seldom"] == []


# ---- four ranks


FOUR = {6: [2, 1, 2, 1], 16: [4] * 4}  # numbers of peers, and how many each row gets


def on_four_ranks() -> dict[Any, Any]:
    row, square = make_mesh(4, timeout=30), make_mesh(2, 2, timeout=30)
    found: dict[Any, Any] = {n: run(row, unequal(n)) for n in FOUR}
    return {**found, "square": run(square, unequal(3)), "refused": copies_of_a_group(square)}


def copies_of_a_group(mesh: Mesh) -> str:
    peers = cohort(3)
    mesh.distribute(peers, keep=True)
    sync_batchnorm(peers, mesh)
    with pytest.raises(InputError) as caught:
        train(peers, mesh, exchange="weights")
    return str(caught.value)


def unequal(peers: int) -> dict[str, Any]:
    return {"make": lambda: cohort(peers), "steps": STEPS if peers < 16 else FEW}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[Any, Any]]:
    return run_ranks(4, on_four_ranks)


@pytest.mark.parametrize("peers", FOUR)
def test_four_ranks_train_bit_for_bit_as_one_process(four_ranks, peers):
    alone, ranks = run(None, unequal(peers)), [rank[peers] for rank in four_ranks]
    for rank in ranks:
        for n, t in rank["weights"].items():
            assert torch.equal(t, alone["weights"][n]), n
        assert torch.equal(rank["losses"][:, rank["local"]], alone["losses"][:, rank["local"]])
    counts = [len(rank["local"]) for rank in ranks]
    assert counts == FOUR[peers]


def test_two_by_two_train_as_one_process(four_ranks):
    alone = run(None, {**unequal(3), "accumulate": 2})
    ranks = [rank["square"] for rank in four_ranks]
    for n, t in alone["weights"].items():
        here = [rank for rank in ranks if n in rank["weights"]]
        assert len(here) == 2
        for rank in here:
            if not n.rpartition(".")[2].startswith(("running_", "num_")):  # each column's own
                torch.testing.assert_close(rank["weights"][n], t, rtol=0, atol=1e-15)
    for rank in ranks:
        local = [*rank["local"]]
        shares = sum(r["losses"] for r in ranks if r["local"] == rank["local"])
        torch.testing.assert_close(shares[:, local], alone["losses"][:, local], rtol=0, atol=1e-14)


def test_copies_of_peers_whose_batchnorm_sees_the_whole_batch_are_refused(four_ranks):
    assert {rank["refused"] for rank in four_ranks} == {
        "exchange='weights' runs copies of peers, whose BatchNorm sees one column's share of a "
        "batch: leave sync_batchnorm out, or use exchange='logits'"
    }
