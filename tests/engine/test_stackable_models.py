"""What layers and attributes do not tell of a model is found by the proof, or watched."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdml.engine.stackable import Unstackable, Watch

from .stackable_nets import Hidden, Net, assert_refused, batch, cohort_of, stacked


class Mixing(torch.autograd.Function):
    """Mixes gradients alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(1)


def counts(net, x):
    net.calls = getattr(net, "calls", 0) + 1
    return x


def counts_inside(net, x):
    net.table["calls"] += 1
    return x


def counting(table):
    net = Net(counts_inside)
    net.table = table
    return net


def keeps(net, x):
    net.seen.append(x.detach())
    return x


def keeping():
    net = Net(keeps)
    net.seen = []
    return net


class Overwriting(Net):
    def forward(self, x):
        return super().forward(x.mul_(1.1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Net(lambda net, x: F.normalize(x, dim=1) if net.training else x),
            "the way that Net",
        ),
        (lambda: Net(lambda net, x: x.softmax(1) if net.norm.training else x), "the way that Net"),
        (lambda: Net(lambda net, x: x + 1e-3 * x.mean(1, keepdim=True)), "the way that Net"),
        (lambda: Net(lambda net, x: F.layer_norm(x, x.shape[1:])), "the way that Net"),
        (lambda: Net(lambda net, x: x.flip(1)), "the way that Net"),
        (lambda: Net(lambda net, x: Mixing.apply(x)), "the way that Net"),
        (lambda: Net(Hidden()), "the way that Net"),
        (lambda: Net(lambda net, x: torch.cat([x, x], 1)[:, ::2]), "the way that Net"),
        (lambda: Net(lambda net, x: x * net.conv.out_channels), "the way that Net"),
        (lambda: Net(lambda net, x: x.view(len(x), 4, 8, 8)), "the way that Net"),
        (Overwriting, "fail in float64 .RuntimeError: .* modified by an inplace"),
        (lambda: Net(lambda net, x: x / 2 if x.max() > 90 else x), "a model that looks at values"),
        (lambda: Net(lambda net, x: x * x.mean().item()), "a model that looks at values"),
        (lambda: Net(lambda net, x: x + len(x.nonzero())), "a model that looks at values"),
        (lambda: Net(counts), r"a model that changes its attributes \(Net\)"),
        (keeping, r"a model that changes its attributes \(Net\)"),
        (lambda: counting({"calls": 0}), r"changes what its attributes hold \(Net\)"),
        (lambda: counting({"calls": torch.zeros(1)}), r"changes what its attributes hold \(Net\)"),
        (
            lambda: Net(lambda net, x: x.float().double() @ torch.ones(8, 8)),
            "fail in float64 .Runt",
        ),
    ],
)
def test_what_layers_do_not_tell(build, message):
    assert_refused(cohort_of(build), message)


class Settings:
    """As of a configuration that all layers of a network share."""

    def __init__(self):
        self.factor, self.more = 1.0, {"bias": [0.0]}

    def apply(self, x):
        return x * self.factor


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 1.0


class Closed:
    """A function with a setting around it; copies have their own."""

    def __init__(self, factor=1.0):
        def scaled(x):
            return x * factor

        def change(value):
            nonlocal factor
            factor = value

        self.scaled, self.change, self.now = scaled, change, lambda: factor

    def __deepcopy__(self, memo):
        return Closed(self.now())


def holding():
    """A network with settings of every kind, each of which changes what it computes."""

    def mix(net, x):
        x = net.method(net.partial(x * net.table["factor"] + net.settings.more["bias"][0]))
        x = x * net.scale + float(net.grid.sum()) + net.pair[0]["bias"] + net.nested[0]
        return net.closed.scaled(x) * net.slotted.factor + len(net.names)

    net = Net(mix)
    net.table, net.settings, net.scale = {"factor": 1.0}, Settings(), torch.tensor(1.0).double()
    net.grid, net.pair, net.nested = np.zeros(2), ({"bias": 0.0}, "x"), [torch.zeros(1).double()]
    net.slotted, net.closed = Slotted(), Closed()
    net.names, net.method = {"a"}, Settings().apply
    net.partial = partial(torch.add, other=torch.zeros(1).double())
    return net


CONTENTS = {
    "an entry of a dict": lambda p: p.table.update(factor=2.0),
    "an object's attribute": lambda p: setattr(p.settings, "more", {"bias": [1.0]}),
    "deep inside": lambda p: p.settings.more["bias"].__setitem__(0, 0.5),
    "a tensor's value": lambda p: p.scale.fill_(2.0),
    "an array's value": lambda p: p.grid.__setitem__(0, 0.5),
    "inside a tuple": lambda p: p.pair[0].update(bias=0.5),
    "a tensor in a list": lambda p: p.nested[0].fill_(0.5),
    "another tensor in a list": lambda p: p.nested.__setitem__(0, torch.ones(1).double()),
    "a slot": lambda p: setattr(p.slotted, "factor", 2.0),
    "around a function": lambda p: p.closed.change(2.0),
    "a set": lambda p: p.names.add("b"),
    "an object behind a method": lambda p: setattr(p.method.__self__, "factor", 2.0),
    "an argument of a partial": lambda p: p.partial.keywords["other"].fill_(0.5),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("changed", [(0,), (1,), (0, 1)])
def test_what_attributes_hold_is_followed_or_refused(name, changed):
    """Changed in one peer they are no longer one network; changed in all they train as in eager."""

    def train(execution):
        cohort = cohort_of(holding)
        step = stacked(cohort, execution=execution)
        torch.manual_seed(3)
        losses = [step(*batch()).losses]
        for k in changed:
            CONTENTS[name](cohort.peers[k])
        losses += [step(*batch(i)).losses for i in (1, 2)]
        return [*losses, *cohort.state_dict().values()]

    if len(changed) == 1:
        with pytest.raises(Unstackable, match="the way that Net combines"):
            train("stacked")
        return
    for a, b in zip(train("eager"), train("stacked"), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8)


def test_a_tensor_that_another_of_its_value_replaced_is_watched():
    net = holding()
    watch = Watch([net])
    assert not watch.changed()
    net.scale = net.scale.clone()
    assert watch.changed()


def test_a_name_without_a_value_around_a_function_is_none():
    def around():
        net = Net()
        net.late = lambda: later
        watch = Watch([net])
        assert not watch.changed()
        later = 1
        return watch, later

    watch, _ = around()
    assert watch.changed()


def test_attributes_that_hold_too_much_to_be_watched():
    cohort = cohort_of(Net)
    for peer in cohort.peers:
        peer.table = [[i] for i in range(2000)]
    assert_refused(cohort, "attributes hold more than can be watched")


@pytest.mark.parametrize(
    "mix",
    [
        lambda net, x: x * x.mean((2, 3), keepdim=True).sigmoid() if net.training else x,
        lambda net, x: x.clamp(max=2) * net.scale,
        lambda net, x: net.other(net.other(x)),
        lambda net, x: x.permute(0, 2, 3, 1).tanh().permute(0, 3, 1, 2),
    ],
)
def test_what_treats_channels_alike_is_taken(mix):
    """Branches, attributes that differ, layers used twice and other layouts; as eager."""
    found = []
    for execution in ("eager", "stacked"):
        torch.manual_seed(3)
        cohort = cohort_of(lambda: Net(mix, other=nn.Conv2d(4, 4, 1)))
        for peer in cohort.peers:
            peer.scale = 1.5
        torch.manual_seed(3)
        step = stacked(cohort, execution=execution)
        losses = [step(*batch(i)).losses for i in range(3)]
        found.append([*losses, *cohort.state_dict().values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8)
