"""Steps on a mesh: what peers draw, losses on features, graphs, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from mesh_runs import C, N, batch, cohort, network, train, weights
from ranks import run_ranks
from torch import Tensor, nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.amp import resolve_amp
from fastdml.engine.execution import StepOptions
from fastdml.engine.mesh_graph import MeshGraphStep
from fastdml.engine.mesh_step import MeshEagerStep
from fastdml.errors import InputError
from fastdml.metric_losses import MetricLoss
from fastdml.parallel import Mesh, make_mesh, total

K, STEPS, CPU = 3, 4, torch.device("cpu")


# ---- peers that draw


def drawing(mesh: Mesh, seed: int = 0, **options: Any) -> dict[str, Any]:
    peers = cohort(K, drop=0.3)
    torch.manual_seed(mesh.rank)  # of no effect
    before = torch.get_rng_state()
    train(peers, mesh, steps=STEPS, seed=seed, **options)
    assert torch.equal(torch.get_rng_state(), before)
    return weights(peers)


# ---- losses on features


class WithFeatures(nn.Module):
    """Features, and logits of them."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        self.num_features = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(6, width, dtype=torch.float64)
            self.last = nn.Linear(width, C, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())

    def logits_and_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.first(x).tanh()
        return self.last(features), features


WEIGHTS = {"triplet": 1.0, "circle": 0.1, "center": 0.05, "distance_mutual": 0.5}


def of_people(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(11, 6, generator=g, dtype=dtype), torch.arange(11) // 3


def with_features(mesh: Mesh | None, **options: Any) -> dict[str, Any]:
    peers = Cohort([WithFeatures(k, 4 + k) for k in range(K)], C)
    metric = MetricLoss(num_classes=C, dims=[4, 5, 6], **WEIGHTS).double()
    outputs, step = train(peers, mesh, steps=STEPS, batches=of_people, metric=metric, **options)
    if mesh is not None:
        outputs = [total(o, mesh) for o in outputs]
    return {
        "weights": weights(peers),
        "losses": torch.stack([o.losses for o in outputs]),
        "metric": torch.stack([o.metric for o in outputs]),
        "centres": [c.centers.clone() for c in metric.centers],
        "local": [*range(K)] if mesh is None else [*mesh.local],
        "sent": 0 if mesh is None else step.exchange.sent,
    }


# ---- a graph


class DirectCapture:
    """Stands in for a CUDA graph: what it records it calls at once, and again at each replay."""

    def __init__(self, device: torch.device) -> None:
        self.calls = 0

    def warm_up(self) -> Any:
        return torch.enable_grad()

    supervised = warm_up

    def capture(self, run: Any) -> Tensor:
        self.run, self.packed = run, run()
        return self.packed

    def replay(self) -> None:
        self.calls += 1
        self.packed.copy_(self.run())


def captured(mesh: Mesh | None, drop: float = 0.0, **options: Any) -> dict[str, Any]:
    peers = cohort(K, drop=drop)
    loss = MutualLoss(temperature=2.0)
    if mesh is None:
        outputs, step = train(peers, None, steps=STEPS)
        return {"weights": weights(peers), "losses": torch.stack([o.losses for o in outputs])}
    mesh.distribute(peers, keep=True)
    optimizer = make_optimizer(peers, lr=0.1)
    given = StepOptions(mesh=mesh, **options)
    inner = MeshEagerStep(peers, loss, optimizer, resolve_amp("off", CPU), given)
    step = MeshGraphStep(inner, DirectCapture)  # type: ignore[arg-type]
    outputs = [step(*batch(i)) for i in range(STEPS)]
    return {
        "weights": weights(peers),
        "losses": torch.stack([o.losses for o in outputs]),
        "local": [*mesh.local],
        "calls": step.captured.calls,  # type: ignore[union-attr]
        "sent": step.exchange.sent,
        "number": step.number,
        "changed": changed(step, peers),
    }


def changed(step: Any, peers: Cohort) -> str:
    for w in peers.parameters():
        w.requires_grad_(False)
        break
    return raised(lambda: step(*batch(0)))


# ---- refusals, the same on all ranks


def raised(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


class Twice(nn.Module):
    """Returns its logits in a tuple, or with `wrong` such of too many classes, or fails."""

    def __init__(self, seed: int, how: str = "") -> None:
        super().__init__()
        self.network, self.how = network(seed, 4 + seed), how

    def forward(self, x: Tensor) -> Any:
        z = self.network(x)
        if self.how == "fails":
            raise ValueError("of the peer's own code")
        return {"": z, "tuple": (z, z), "classes": z[:, :2]}[self.how]


def refusals(mesh: Mesh) -> dict[str, Any]:
    def first_step(how: str, **options: Any) -> str:
        peers = Cohort([Twice(0), Twice(1), Twice(2, how)], C)
        return raised(lambda: train(peers, mesh, steps=1, **options))

    def made(peers: Cohort, **options: Any) -> str:
        optimizer = make_optimizer(peers, lr=0.1)
        return raised(lambda: make_step(peers, MutualLoss(), optimizer, mesh=mesh, **options))

    found = {how: first_step(how) for how in ("tuple", "classes")}
    try:
        found["fails"] = first_step("fails")
    except ValueError as error:
        found["fails"] = f"itself: {error}"
    frozen = cohort(K).requires_grad_(False)
    found["frozen"] = raised(lambda: train(frozen, mesh, steps=1))
    whole, placed = cohort(K), cohort(K)
    found["whole"] = made(whole)
    mesh.distribute(placed)
    for name, options in REFUSED.items():
        found[name] = made(placed, **options)

    def other_rows(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return batch(step, dtype, N + mesh.row)

    found["rows"] = raised(lambda: train(cohort(K), mesh, steps=1, batches=other_rows))

    class Kept(MutualLoss):
        def value_and_grad(self, *given: Any) -> Any:
            return super().value_and_grad(*given)

    optimizer = make_optimizer(placed, lr=0.1)
    found["loss"] = raised(lambda: make_step(placed, Kept(), optimizer, mesh=mesh))
    return found


REFUSED: dict[str, dict[str, Any]] = {
    "threads": {"execution": "threads"},
    "stacked": {"execution": "stacked"},
    "graph": {"execution": "graph"},
    "streams": {"execution": "streams"},
    "sequential": {"update": "sequential"},
    "compiled": {"compile": True},
    "number of threads": {"threads": 2},
}
TEXTS = {
    "tuple": r"peer Twice-3 must return logits \(N, 4\), .* returned tuple: make_step\(output=",
    "classes": r"peer Twice-3 must return logits \(N, 4\), .* returned \(8, 2\)",
    "frozen": "the step has trained nothing",
    "whole": r"call mesh.distribute\(cohort\) on every rank first",
    "threads": "execution 'threads' does not go with a mesh on cpu: use eager",
    "stacked": "execution 'stacked' does not go with a mesh on cpu: use eager",
    "graph": "execution 'graph' does not go with a mesh on cpu: use eager",
    "streams": "execution 'streams' does not go with a mesh on cpu: use eager",
    "sequential": "update='sequential' .* on a mesh use simultaneous",
    "compiled": "compile does not go with a mesh",
    "number of threads": "threads=2 does not go with a mesh: set OMP_NUM_THREADS",
    "rows": "got other numbers of rows: rank 0 8, rank 1 9",
    "loss": "Kept",
}


# ---- the jobs


def on_two_ranks() -> dict[str, Any]:
    row, column = make_mesh(2, 1, timeout=30), make_mesh(1, 2, timeout=30)
    return {
        "drawing": drawing(row),
        "drawing in parts": drawing(row, accumulate=2),
        "drawing in columns": drawing(column),
        "other seed": drawing(row, seed=1),
        "features": with_features(row),
        "features in columns": with_features(column),
        "features of copies": with_features(row, exchange="weights"),
        "features seldom": with_features(row, exchange_every=2),
        "graph": captured(row),
        "graph of copies": captured(row, exchange="weights"),
        "graph that draws": raised(lambda: captured(row, drop=0.3)),
        "graph of two kinds": raised(lambda: captured(row, exchange_every=2)),
        "refused": refusals(row),
    }


def on_one_rank() -> dict[str, Any]:
    mesh = make_mesh()
    plain, same = cohort(K), cohort(K)
    ours, _ = train(plain, mesh, steps=STEPS)
    theirs, _ = train(same, None, steps=STEPS)
    return {
        "drawing": drawing(mesh),
        "drawing in parts": drawing(mesh, accumulate=2),
        "other seed": drawing(mesh, seed=1),
        "weights": (weights(plain), weights(same)),
        "outputs": [([o.losses, o.stats.packed], [p.losses, p.stats.packed])
                    for o, p in zip(ours, theirs, strict=True)],
        "features": (with_features(mesh), with_features(None)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(1, on_one_rank)[0]


def test_a_mesh_of_one_rank_is_the_eager_step_bit_for_bit(one_rank):
    ours, theirs = one_rank["weights"]
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    for our, their in one_rank["outputs"]:
        assert all(map(torch.equal, our, their))
    ours, theirs = one_rank["features"]
    for name in ("losses", "metric"):
        assert torch.equal(ours[name], theirs[name])
    assert all(torch.equal(ours["weights"][n], t) for n, t in theirs["weights"].items())


@pytest.mark.parametrize("name", ["drawing", "drawing in parts", "other seed"])
def test_what_peers_draw_does_not_depend_on_the_mesh(two_ranks, one_rank, name):
    for rank in two_ranks:
        assert rank[name]
        for n, t in rank[name].items():
            assert torch.equal(t, one_rank[name][n]), n
    column = two_ranks[0]["drawing in columns"]
    for n, t in one_rank["drawing in parts"].items():
        if not n.rpartition(".")[2].startswith(("running_", "num_")):
            assert torch.equal(column[n], t), n


def test_what_peers_draw_depends_on_the_seed(one_rank):
    first, other = one_rank["drawing"], one_rank["other seed"]
    assert not torch.equal(first["peers.0.0.weight"], other["peers.0.0.weight"])


def test_losses_on_features_of_two_rows(two_ranks):
    alone = with_features(None)
    for rank in two_ranks:
        for case in ("features", "features of copies"):
            found, local = rank[case], rank[case]["local"]
            for n, t in found["weights"].items():
                torch.testing.assert_close(t, alone["weights"][n], rtol=0, atol=1e-14)
            for name in ("losses", "metric"):
                close = found[name][:, local], alone[name][:, local]
                torch.testing.assert_close(*close, rtol=0, atol=1e-13)
            for k in local:
                torch.testing.assert_close(found["centres"][k], alone["centres"][k])
        local, found = len(rank["features"]["local"]), rank["features"]["sent"]
        assert found == STEPS * local * (11 * C + 11 * 11) * 8  # logits and distances


def test_losses_on_features_at_every_second_step(two_ranks):
    for rank in two_ranks:
        found = rank["features seldom"]
        local = len(found["local"])
        assert found["sent"] == STEPS // 2 * local * (11 * C + 11 * 11) * 8
        assert found["metric"].gt(0)[:, found["local"]].all()  # the peers' own go on


def test_losses_on_features_of_two_columns(two_ranks):
    """Sums in another order, four steps of which grow apart by some hundred roundings."""
    alone = with_features(None)
    for rank in two_ranks:
        found = rank["features in columns"]
        for n, t in alone["weights"].items():
            torch.testing.assert_close(found["weights"][n], t, rtol=0, atol=1e-11)
        torch.testing.assert_close(found["metric"], alone["metric"], rtol=0, atol=1e-11)
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=0, atol=1e-11)
        assert found["sent"] == 0


def test_captured_steps_are_the_plain_ones(two_ranks):
    alone = captured(None)
    for rank in two_ranks:
        for case in ("graph", "graph of copies"):
            found, local = rank[case], rank[case]["local"]
            for n, t in found["weights"].items():
                assert torch.equal(t, alone["weights"][n]), n
            assert torch.equal(found["losses"][:, local], alone["losses"][:, local])
            assert found["calls"] == STEPS - 1
            assert found["number"] == STEPS
            assert "what is frozen has changed since the step was captured" in found["changed"]
        assert rank["graph"]["sent"] == STEPS * len(local) * N * C * 8


def test_what_a_graph_cannot_do(two_ranks):
    for rank in two_ranks:
        assert "draws random numbers in training" in rank["graph that draws"]
        assert "exchange_every=2 there are two kinds" in rank["graph of two kinds"]


@pytest.mark.parametrize("name", TEXTS)
def test_all_ranks_refuse_with_one_line(two_ranks, name):
    texts = {rank["refused"][name] for rank in two_ranks}
    assert len(texts) == 1
    text = texts.pop()
    assert "\n" not in text
    assert re.search(TEXTS[name], text), text


def test_a_peer_that_fails_ends_the_other_ranks_too(two_ranks):
    first, second = (rank["refused"]["fails"] for rank in two_ranks)
    assert first == "rank 1: ValueError: of the peer's own code"
    assert second == "itself: of the peer's own code"
