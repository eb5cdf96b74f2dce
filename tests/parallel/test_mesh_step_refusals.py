"""What a step on a mesh does after a failure, beside other cohorts, when it is copied, and with
peers of which nothing trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mesh_runs import C, batch, cohort, network, share, train, weights
from ranks import run_ranks
from torch import Tensor, nn

from fastdml import Cohort
from fastdml.engine import Ema
from fastdml.engine.amp import Amp, LossScale
from fastdml.errors import InputError
from fastdml.parallel import Mesh, make_mesh

CPU = torch.device("cpu")


class Failing(nn.Module):
    """A network that raises this, once it is set."""

    error: BaseException | None = None

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = network(seed, 4 + seed)

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.network(x)


class Constant(nn.Module):
    """Logits without a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).repeat(1, C // 2)


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def after_a_failure(mesh: Mesh, error: BaseException) -> dict[str, Any]:
    peers = Cohort([Failing(k) for k in range(3)], C)
    _, step = train(peers, mesh, steps=2)
    for k in mesh.local:
        peers[k].error = error
    with pytest.raises(type(error)):
        step(*share(batch(2), mesh))
    for k in mesh.local:
        peers[k].error = None
    before = weights(peers)
    found = said(lambda: step(*share(batch(3), mesh)))
    now = weights(peers)
    return {"said": found, "same": all(torch.equal(now[n], t) for n, t in before.items())}


def without_grad(mesh: Mesh) -> str:
    """Nothing has travelled where no step begins."""
    _, step = train(cohort(3), mesh, steps=1)
    with torch.no_grad():
        found = said(lambda: step(*share(batch(1), mesh)))
    step(*share(batch(1), mesh))
    return found


def two_cohorts(mesh: Mesh) -> str:
    _, first = train(cohort(3), mesh, steps=2)
    _, second = train(cohort(2), mesh, steps=2)
    second(*share(batch(2), mesh))
    return said(lambda: first(*share(batch(2), mesh)))


def copies(mesh: Mesh) -> dict[str, Any]:
    peers = cohort(3, drop=0.3)
    _, step = train(peers, mesh, steps=3)
    again: Any = copy.deepcopy(step)
    for own in (step, again):
        own(*share(batch(3), mesh))
    pairs = zip(peers.parameters(), again.cohort.parameters(), strict=True)
    return {
        "pickled": [said(lambda x=x: pickle.dumps(x)) for x in (peers, step)],
        "number": again.number,
        "same": all(torch.equal(a, b) for a, b in pairs),
    }


def frozen_rows(mesh: Mesh | None) -> dict[str, Any]:
    """Averages where peers 1 and 2, the second row's, have nothing that moves."""
    peers = cohort(3)
    for k in (1, 2):
        peers.peers[k] = nn.Sequential(nn.Flatten(), nn.Linear(50, C)).double()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(k)
            peers[k][1].reset_parameters()
        peers[k].requires_grad_(False)
    if mesh is not None:
        mesh.distribute(peers)
    ema = Ema(peers, 0.5)
    train(peers, mesh, steps=3, ema=ema)
    return dict(ema.state_dict())


def flags_of_frozen(mesh: Mesh | None) -> Tensor:
    """Of three peers that overflow, the first one is then frozen."""
    peers = cohort(3, torch.float32)
    with torch.no_grad():
        for peer in peers:
            peer[-1].weight.mul_(30)
    amp = Amp(CPU, torch.float16, LossScale(CPU, init=2.0**16))
    _, step = train(peers, mesh, steps=1, amp=amp)
    if mesh is None or 0 in mesh.local:
        peers[0].requires_grad_(False)
    step(*batch(1, torch.float32))
    assert amp.scaler is not None
    found = [step.update.overflow, step.update.skipped[None], amp.scaler.scale.reshape(1)]
    return torch.cat(found).clone()


def on_two_ranks() -> dict[str, Any]:
    row, column = make_mesh(2, 1, timeout=10), make_mesh(1, 2, timeout=10)
    found: dict[str, Any] = {
        "peer": after_a_failure(make_mesh(2, 1, timeout=10), RuntimeError("out of memory")),
        "interrupt": after_a_failure(make_mesh(2, 1, timeout=10), KeyboardInterrupt()),
        "data": after_a_failure(make_mesh(1, 2, timeout=10), RuntimeError("out of memory")),
        "without grad": [without_grad(row), without_grad(column)],
        "cohorts": [two_cohorts(row), two_cohorts(column)],
        "copies": [copies(row), copies(column)],
        "no parameters": [
            said(lambda m=mesh: m.distribute(Cohort([network(0, 4), network(1, 6), Constant()], C)))
            for mesh in (row, column)
        ],
        "averages": frozen_rows(row),
        "flags": flags_of_frozen(row),
    }
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


@pytest.mark.parametrize("where", ["peer", "interrupt", "data"])
def test_no_step_is_taken_after_one_that_failed_between_ranks(two_ranks, where):
    for rank in two_ranks:
        assert "a step failed on this rank" in rank[where]["said"]
        assert rank[where]["same"]


def test_a_step_that_never_began_can_be_taken_again(two_ranks):
    for rank in two_ranks:
        assert all("under torch.no_grad()" in line for line in rank["without grad"])


def test_a_mesh_whose_rows_were_given_to_other_peers_is_refused(two_ranks):
    for rank in two_ranks:
        assert all("peers of another cohort" in line for line in rank["cohorts"])


def test_copies_of_a_step_go_on_as_it_does_and_a_mesh_is_not_pickled(two_ranks):
    for rank in two_ranks:
        for found in rank["copies"]:
            assert found["number"] == 4
            assert found["same"]
            assert all("cannot be pickled" in line for line in found["pickled"])


def test_peers_without_parameters_are_refused_on_every_rank(two_ranks):
    for rank in two_ranks:
        assert all(line.startswith("peer Constant has no param") for line in rank["no parameters"])


def test_averages_of_a_row_whose_peers_are_frozen(two_ranks):
    alone = frozen_rows(None)
    for rank in two_ranks:
        assert rank["averages"]
        for name, t in rank["averages"].items():
            assert torch.equal(t, alone[name]), name


def test_overflow_flags_of_peers_that_train_no_more(two_ranks):
    alone = flags_of_frozen(None)
    assert alone[0] == 1
    for rank in two_ranks:
        assert torch.equal(rank["flags"], alone)
