"""Optimizer state by the names of parameters, of optimizers of several kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from mesh_runs import batch, cohort
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer
from fastdml.engine.optimizer_state import by_name, load_by_name, state_by_name
from fastdml.errors import InputError


class Momentum(torch.optim.Optimizer):
    """As Apex's FusedSGD: a number as its rate, state from the first step on, no step count."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "momentum": 0.9, "wd_after_momentum": False})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    state = self.state[w]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(w)
                    buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(w.grad)
                    w.sub_(buffer, alpha=float(group["lr"]))


KINDS = {
    "sgd": lambda c: make_optimizer(c, "sgd", lr=0.1, weight_decay=1e-3),
    "sgd without momentum": lambda c: make_optimizer(c, "sgd", lr=0.1, momentum=0.0),
    "adam": lambda c: make_optimizer(c, "adam", lr=0.01),
    "adamw": lambda c: make_optimizer(c, "adamw", lr=0.01, weight_decay=0.1),
    "torch's adamw, named": lambda c: torch.optim.AdamW(
        [{"params": [*peer.named_parameters()]} for peer in c], lr=0.01, amsgrad=True
    ),
    "rmsprop, one group": lambda c: torch.optim.RMSprop(c.parameters(), lr=0.01, centered=True),
    "a number as rate": lambda c: Momentum([{"params": [*peer.parameters()]} for peer in c], 0.1),
}


def go(peers: Cohort, optimizer, steps) -> None:
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(z, labels) for z in peers(images)).backward()
        optimizer.step()


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_bit_for_bit_and_in_parts(kind):
    """Saved by name, every peer's part is loaded into an optimizer of all peers, and into one of
    that peer alone."""
    peers = cohort(2)
    for w in peers[1][0].parameters():
        w.requires_grad_(False)
    optimizer = KINDS[kind](peers)
    go(peers, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
    weights = copy.deepcopy(peers.state_dict())
    states = copy.deepcopy({k: state_by_name(optimizer, peer) for k, peer in enumerate(peers)})
    names = [name for group in states[0]["groups"] for name in group["names"]]
    assert names == [name for name, _ in peers[0].named_parameters()]
    go(peers, optimizer, range(3, 6))

    again = cohort(2)
    again.load_state_dict(weights)
    again[1][0].requires_grad_(False)
    resumed = KINDS[kind](again)
    load_by_name(resumed, dict(enumerate(again)), copy.deepcopy(states))
    go(again, resumed, range(3, 6))
    assert same(again, peers)

    one = cohort(2)
    one.load_state_dict(weights)
    alone = Cohort([one[1]], one.num_classes)
    alone[0][0].requires_grad_(False)
    resumed = KINDS[kind](alone)
    load_by_name(resumed, {1: alone[0]}, {1: states[1]})
    go(alone, resumed, range(3, 6))
    if "one group" not in kind:  # there peer 1 had the rate that is in the only group
        assert same(alone[0], peers[1])


def test_of_torchs_own_state():
    """That of a run without a mesh, where each peer has a group."""
    peers = cohort(3)
    optimizer = KINDS["adam"](peers)
    go(peers, optimizer, range(2))
    found = by_name(optimizer.state_dict(), {1: peers[1]})
    wanted = state_by_name(optimizer, peers[1])
    assert found.keys() == {1}
    assert found[1]["groups"][0]["names"] == wanted["groups"][0]["names"]
    for name, state in wanted["state"].items():
        assert all(torch.equal(found[1]["state"][name][key], state[key]) for key in state)


def test_other_parameters_are_refused_by_name():
    peers = cohort(2)
    peers[0][0].requires_grad_(False)
    optimizer = KINDS["sgd"](peers)
    states = {k: state_by_name(optimizer, peer) for k, peer in enumerate(peers)}
    more = cohort(2)
    with pytest.raises(InputError, match=r"nothing of the parameter 0\.weight of peer 0"):
        load_by_name(KINDS["sgd"](more), dict(enumerate(more)), states)
    less = cohort(2)
    less[0][0].requires_grad_(False)
    less[1][5].requires_grad_(False)
    with pytest.raises(InputError, match=r"no longer has the parameter \d\.weight of peer 1"):
        load_by_name(KINDS["sgd"](less), dict(enumerate(less)), states)
    with pytest.raises(InputError, match="the optimizer had 2 groups"):
        by_name(optimizer.state_dict(), {2: peers[0]})
    with pytest.raises(InputError, match="parameters of a peer that has"):
        by_name(optimizer.state_dict(), {0: more[0]})


def test_different_settings_do_not_become_one_group():
    peers = cohort(2)
    optimizer = KINDS["sgd"](peers)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    states = {k: state_by_name(optimizer, peer) for k, peer in enumerate(peers)}
    one = torch.optim.SGD(peers.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match="had different settings"):
        load_by_name(one, dict(enumerate(peers)), states)
