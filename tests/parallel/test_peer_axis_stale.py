"""Peers that learn from each other at some steps only, or from copies of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import C, N, batch, cohort, network, train, weights
from ranks import run_ranks
from torch import Tensor, nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.parallel import Mesh, make_mesh

K, STEPS, EVERY = 3, 7, 3  # two peers on the first rank


def seldom(mesh: Mesh | None, every: int = EVERY) -> dict[str, Any]:
    """Exchanges logits at every third step; in one process by hand."""
    peers, loss = cohort(K), MutualLoss(temperature=2.0, label_smoothing=0.1)
    peers.teachers = [network(20, 8)]
    options: dict[str, Any] = {}
    if mesh is not None:
        options = {"mesh": mesh, "exchange_every": every}
        mesh.distribute(peers)
    optimizer = make_optimizer(peers, lr=0.1)
    step = make_step(peers, loss, optimizer, execution="eager", amp="off", **options)
    outputs = []
    for i in range(STEPS):
        if mesh is None:
            loss.kl_weight = 0.0 if i % every else 1.0
        outputs.append(step(*batch(i)))
    found = {
        "weights": weights(peers),
        "losses": torch.stack([o.losses for o in outputs]),
        "ce": torch.stack([o.stats.ce for o in outputs]),
        "correct": torch.stack([o.stats.correct for o in outputs]),
        "entropy": torch.stack([o.stats.entropy for o in outputs]),
        "kl": torch.stack([o.stats.kl for o in outputs]),
        "teacher": torch.stack([o.teacher_kl for o in outputs]),
        "ensemble": torch.stack([o.stats.ensemble_correct for o in outputs]),
    }
    if mesh is not None:
        found |= {"local": [*mesh.local], "sent": step.exchange.sent, "got": step.exchange.received}
    return found


def copies(mesh: Mesh | None, **options: Any) -> dict[str, Any]:
    peers = cohort(K, drop=0.3)
    outputs, step = train(peers, mesh, steps=STEPS, **options)
    own = [*mesh.local] if mesh is not None else range(K)
    return {
        "weights": weights(peers),
        "losses": torch.stack([o.losses for o in outputs])[:, own],
        "sent": step.exchange.sent,
        "got": step.exchange.received,
        "bytes": sum(t.nbytes for k in own for t in [*peers[k].parameters(), *peers[k].buffers()]),
    }


def old_copies(mesh: Mesh) -> dict[str, Any]:
    """What each rank learns from the others' peers as they were at the last multiple of EVERY, by
    hand: a cohort of all peers a rank, whose other peers are put back."""
    by_mesh, copied = cohort(K), cohort(K)
    train(by_mesh, mesh, steps=STEPS, exchange="weights", exchange_every=EVERY)
    everyone = [cohort(K) for _ in range(2)]  # the cohort as each row has it
    steps = []
    for peers in everyone:
        optimizer = make_optimizer(peers, lr=0.1)
        loss = MutualLoss(temperature=2.0)
        steps.append(make_step(peers, loss, optimizer, execution="eager", amp="off"))
    rows = ((0, 1), (2,))
    for i in range(STEPS):
        if i % EVERY == 0:
            copied = cohort(K)
            for peers, row in zip(everyone, rows, strict=True):
                for k in row:
                    copied[k].load_state_dict(peers[k].state_dict())
        for peers, row in zip(everyone, rows, strict=True):
            for k in {*range(K)} - {*row}:
                peers[k].load_state_dict(copied[k].state_dict())
        for step in steps:
            step(*batch(i))
    expected = weights(everyone[mesh.row])
    now = weights(by_mesh)
    return {n: torch.equal(t, expected[n]) for n, t in now.items()}


def resumed(mesh: Mesh) -> dict[str, bool]:
    """Between two fetches: with the copies kept as without a stop, without them fetched anew."""
    whole, part = cohort(K), cohort(K)
    options: dict[str, Any] = {"exchange": "weights", "exchange_every": 4}
    train(whole, mesh, steps=6, optimizer="sgd", **options)
    _, before = train(part, mesh, steps=3, **options)
    state = {n: t.clone() for n, t in part.state_dict().items()}
    kept, moments = before.state_dict(), before.optimizer.state_dict()
    found = {}
    for name, given in (("kept", kept), ("anew", {})):
        again = cohort(K)
        mesh.distribute(again, keep=True)
        optimizer = make_optimizer(again, lr=0.1)
        step = make_step(
            again, MutualLoss(temperature=2.0), optimizer, amp="off", mesh=mesh, **options
        )
        again.load_state_dict(state)
        optimizer.load_state_dict(moments)
        step.load_state_dict(given)
        step.number = 3
        for i in range(3, 6):
            step(*batch(i))
        sent = step.exchange.sent
        expected = weights(whole)
        same = all(torch.equal(t, expected[n]) for n, t in weights(again).items())
        found |= {name: same, f"{name} sent": sent}
    return found


def on_two_ranks() -> dict[str, Any]:
    mesh = make_mesh(2, timeout=30)
    return {
        "seldom": seldom(mesh),
        "fresh": copies(mesh, exchange="weights"),
        "logits": copies(mesh),
        "old": old_copies(mesh),
        "third": copies(mesh, exchange="weights", exchange_every=EVERY),
        "resumed": resumed(mesh),
        "refused": refused(mesh),
    }


def message(peers: Cohort, mesh: Mesh, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        make_step(peers, MutualLoss(), make_optimizer(peers, lr=0.1), mesh=mesh, **options)
    return str(caught.value)


class NoCopy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def __deepcopy__(self, memo: Any) -> NoCopy:
        raise RuntimeError("held by a camera")


def refused(mesh: Mesh) -> dict[str, str]:
    lost = cohort(K)
    mesh.distribute(lost)
    odd = Cohort([NoCopy(), NoCopy(), NoCopy()], C)
    mesh.distribute(odd, keep=True)
    grown = cohort(K)
    _, step = train(grown, mesh, steps=1, exchange="weights")
    for k in mesh.local:
        grown[k][-1] = nn.Linear(grown[k][-1].in_features, C, bias=False, dtype=torch.float64)
    with pytest.raises(InputError) as caught:
        step(*batch(1))
    return {
        "grown": str(caught.value),
        "lost": message(lost, mesh, exchange="weights"),
        "uncopied": message(odd, mesh, exchange="weights"),
        "every": message(lost, mesh, exchange_every=0),
        "kind": message(lost, mesh, exchange="features"),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


def test_the_kl_term_exists_at_every_third_step_only(ranks):
    alone = seldom(None)
    for rank in ranks:
        found, local = rank["seldom"], rank["seldom"]["local"]
        for n, t in found["weights"].items():
            assert torch.equal(t, alone["weights"][n]), n
        for name in ("losses", "ce", "correct", "entropy"):
            assert torch.equal(found[name][:, local], alone[name][:, local]), name
        with_kl = [i for i in range(STEPS) if i % EVERY == 0]
        without = [i for i in range(STEPS) if i % EVERY]
        for name in ("kl", "teacher"):
            assert torch.equal(found[name][with_kl][..., local], alone[name][with_kl][..., local])
        assert torch.equal(found["ensemble"][with_kl], alone["ensemble"][with_kl])
        for name in ("kl", "teacher", "ensemble"):
            assert not found[name][without].any()
        assert found["sent"] == len(with_kl) * N * C * 8 * len(local)
        assert found["got"] == len(with_kl) * N * C * 8 * (K - len(local))


def test_fresh_copies_teach_what_logits_teach(ranks):
    """They see the same batch and draw the same dropout."""
    for rank in ranks:
        for n, t in rank["fresh"]["weights"].items():
            assert torch.equal(t, rank["logits"]["weights"][n]), n
        assert torch.equal(rank["fresh"]["losses"], rank["logits"]["losses"])


def test_copies_are_as_old_as_the_last_exchange(ranks):
    for rank in ranks:
        assert rank["old"]
        assert all(rank["old"].values())


def test_weights_and_buffers_travel_at_every_third_step(ranks):
    first, second = ranks
    for name, times in (("fresh", STEPS), ("third", 3)):
        assert first[name]["sent"] == second[name]["got"] == times * first[name]["bytes"]
        assert second[name]["sent"] == first[name]["got"] == times * second[name]["bytes"]


def test_copies_are_resumed_or_fetched(ranks):
    for rank in ranks:
        assert rank["resumed"]["kept"]
        assert not rank["resumed"]["anew"]
        assert rank["resumed"]["anew sent"] == 2 * rank["resumed"]["kept sent"] > 0


def test_what_cannot_be(ranks):
    for rank in ranks:
        refused = rank["refused"]
        assert "Sequential-" in refused["grown"]
        assert "has other weights than when the step was made, of which" in refused["grown"]
        assert "call mesh.distribute(cohort, keep=True)" in refused["lost"]
        assert "cannot be copied, which exchange='weights' needs: held by" in refused["uncopied"]
        assert refused["every"] == "exchange_every must be 1 or more, not 0"
        assert refused["kind"] == "exchange must be logits or weights, not 'features'"
