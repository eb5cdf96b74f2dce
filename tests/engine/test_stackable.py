"""What peers must be to be stacked: everything else is refused, and the peers stay as they were."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastdml.cohort import Cohort
from fastdml.engine.stackable import Unstackable, Watch

from .stackable_nets import (
    C,
    Hidden,
    Net,
    assert_refused,
    batch,
    cohort_of,
    memory,
    saved_bytes,
    stacked,
)


def hook(*_):
    return None


def accumulator(w):
    node = torch.autograd.graph.get_gradient_edge(w).node
    node.register_hook(hook)
    return node


HOOKS = {
    "forward": lambda p: p.head.register_forward_hook(hook),
    "forward pre": lambda p: p.conv.register_forward_pre_hook(hook),
    "backward": lambda p: p.head.register_full_backward_hook(hook),
    "backward pre": lambda p: p.norm.register_full_backward_pre_hook(hook),
    "whole peer": lambda p: p.register_forward_hook(hook, with_kwargs=True, always_call=True),
    "tensor": lambda p: p.head.bias.register_hook(hook),
    "accumulated": lambda p: p.conv.weight.register_post_accumulate_grad_hook(hook),
}
AT_THE_DOOR = {  # are found when peers are stacked alone
    "accumulator": lambda p: accumulator(p.head.weight),
    "several": lambda p: torch.autograd.graph.register_multi_grad_hook([p.head.weight], hook),
}
GLOBAL = ("module_forward_hook", "module_forward_pre_hook", "module_full_backward_hook")


class TestHooks:
    @pytest.mark.parametrize("name", [*HOOKS, *AT_THE_DOOR])
    @pytest.mark.parametrize("k", [0, 1])
    def test_before_the_step_is_made(self, name, k):
        cohort = cohort_of(Net)
        held = {**HOOKS, **AT_THE_DOOR}[name](cohort.peers[k])
        assert_refused(cohort, "does not know a .*hook")
        del held

    def test_a_graph_that_is_kept_is_no_hook(self):
        cohort = cohort_of(Net)
        losses = cohort(batch()[0])[0].sum()
        stacked(cohort)(*batch())
        assert losses.requires_grad

    @pytest.mark.parametrize("name", HOOKS)
    @pytest.mark.parametrize("steps", [0, 2])
    def test_afterwards(self, name, steps):
        cohort = cohort_of(Net)
        own = saved_bytes(cohort.peers[0])
        step = stacked(cohort)
        for i in range(steps):
            step(*batch(i))
        assert (saved_bytes(cohort.peers[0]) > own) == (steps > 0)
        handle = HOOKS[name](cohort.peers[1])
        values = copy.deepcopy(cohort.state_dict())
        with pytest.raises(Unstackable, match=r"does not know a .*hooks"):
            step(*batch(9))
        # the weights are the peers' own again: what is saved does not hold all of them
        assert saved_bytes(cohort.peers[0]) == own
        assert all(torch.equal(v, values[k]) for k, v in cohort.state_dict().items())
        handle.remove()
        step(*batch(9))
        assert not torch.equal(cohort.peers[0].conv.weight, values["peers.0.conv.weight"])

    @pytest.mark.parametrize("name", GLOBAL)
    def test_on_all_modules(self, name):
        cohort = cohort_of(Net)
        step = stacked(cohort)
        step(*batch())
        handle = getattr(nn.modules.module, f"register_{name}")(hook)
        try:
            with pytest.raises(Unstackable, match="does not know hooks on all modules"):
                step(*batch(1))
            assert_refused(cohort, "does not know hooks on all modules")
        finally:
            handle.remove()
        step(*batch(1))

    def test_of_state_dicts_alone_are_no_matter(self):
        cohort = cohort_of(Net)
        step = stacked(cohort)
        cohort.peers[0].register_state_dict_post_hook(hook)
        step(*batch())
        cohort.peers[1].register_load_state_dict_pre_hook(hook)
        before = memory(cohort)
        step(*batch(1))
        assert memory(cohort) == before


def tied():
    net = Net(mix=lambda net, x: net.third(x), third=nn.Conv2d(4, 4, 3, padding=1))
    net.third.weight = net.second.weight
    return net


def tied_inside():
    net = Net()
    net.norm.bias = net.norm.weight
    return net


def tied_in_memory():
    net = Net(mix=lambda net, x: net.third(x), third=nn.Conv2d(4, 4, 3, padding=1)).double()
    net.third.weight.data = net.second.weight.data
    return net


def part_of_another():
    net = Net(mix=lambda net, x: net.third(x), third=nn.Conv2d(4, 2, 1)).double()
    net.third = nn.Conv2d(4, 4, 1, bias=False).double()
    net.third.weight.data = net.second.weight.data.view(-1)[:16].view(4, 4, 1, 1)
    return net


def tied_statistics():
    net = Net(mix=lambda net, x: net.third(x), third=nn.BatchNorm2d(4)).double()
    net.third.running_mean = net.norm.running_mean
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tied, r"a weight that is used twice \(second.weight of peer 0, third.weight of peer 0\)"),
        (tied_inside, r"used twice \(norm.weight of peer 0, norm.bias of peer 0\)"),
        (tied_in_memory, "weights that share memory .*third.weight of peer"),
        (part_of_another, "weights that share memory .*third.weight of peer"),
        (tied_statistics, "used twice .*third.running_mean"),
    ],
)
def test_tied_weights(build, message):
    assert_refused(cohort_of(build), message)


def test_layers_of_two_peers_that_are_one():
    cohort = cohort_of(lambda: Net(norm=nn.BatchNorm2d(4, affine=False)))
    cohort.peers[1].norm = cohort.peers[0].norm
    message = r"used twice \(norm.running_mean of peer 0, norm.running_mean of peer 1\)"
    assert_refused(cohort, message)


def test_layers_in_two_places_of_one_peer_alone():
    """By their names the peers look alike."""

    def build(order):
        a, b = nn.Linear(6, 6), nn.Linear(6, 6)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), *(order(a, b)), nn.Linear(6, C))

    peers = [build(lambda a, b: (a, b, a)).double(), build(lambda a, b: (a, b, b)).double()]
    assert_refused(Cohort(peers, C), "peers 0 and 1 have different layers")


def compiled_in_place():
    net = Net()
    net.second.compile(backend="eager")
    return net


def shadowed():
    net = Net()
    net.second.forward = lambda x: x
    return net


def injected():
    net = Net()
    net.head.down = nn.Linear(4, 1)
    return net


class Adapted(nn.Linear):
    """As LoRA does it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.down = nn.Linear(self.in_features, 1)

    def forward(self, x):
        return super().forward(x) + self.down(x)


class Frozen(nn.Module):
    """BatchNorm as detection has it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return x * self.scale[:, None, None]


def second(wrap):
    def build():
        net = Net()
        net.second = wrap(net.second)
        return net

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.compile(Net(), backend="eager"), "a module that went through torch.compile"),
        (second(lambda m: torch.compile(m, backend="eager")), "through torch.compile, .*second"),
        (compiled_in_place, r"through torch.compile, .*\(second\)"),
        (lambda: nn.DataParallel(Net()), "DataParallel"),
        (second(nn.DataParallel), "DataParallel at second"),
        (
            second(lambda m: torch.jit.trace(m, torch.zeros(1, 4, 8, 8))),
            "a layer of type TopLevelTracedModule",
        ),
        (second(parametrizations.weight_norm), "a parametrized module"),
        (second(parametrizations.spectral_norm), "a parametrized module"),
        (second(nn.utils.spectral_norm), "a module with hooks"),
        (second(lambda m: prune.random_unstructured(m, "weight", 0.5)), "a module with hooks"),
        (injected, r"modules inside a Linear \(head\)"),
        (shadowed, r"a module with a forward of its own \(second\)"),
        (lambda: Net(head=Adapted(4, C)), r"a layer of type Adapted with weights of its own"),
        (second(lambda m: Frozen()), "a layer of type Frozen with weights of its own"),
        (second(lambda m: nn.GroupNorm(2, 4)), "a layer of type GroupNorm"),
        (second(lambda m: nn.GroupNorm(2, 4, affine=False)), "a layer of type GroupNorm"),
        (second(lambda m: nn.InstanceNorm2d(4)), "a layer of type InstanceNorm2d"),
        (second(lambda m: nn.Softmax(1)), "a layer of type Softmax"),
        (second(lambda m: nn.PReLU()), "a layer of type PReLU"),
        (second(lambda m: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "padding_mode='"),
        (second(lambda m: nn.BatchNorm2d(4, momentum=None)), "BatchNorm with momentum=None"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.filterwarnings("ignore")  # of what torch has since replaced
def test_wrappers_and_unknown_layers(build, message):
    assert_refused(cohort_of(build), message)


@pytest.fixture
def job():
    """A distributed job of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def reduced(net, x):
    dist.all_reduce(y := x.mean().detach().clone())
    return x * y


@pytest.mark.usefixtures("job")
@pytest.mark.filterwarnings("ignore")
def test_distributed_peers():
    cohort = cohort_of(Net)
    cohort.peers[1].second = nn.parallel.DistributedDataParallel(cohort.peers[1].second)
    assert_refused(cohort, "DistributedDataParallel at second; use another")
    assert_refused(cohort_of(lambda: Net(nn.SyncBatchNorm(4))), "SyncBatchNorm at mix")
    assert_refused(cohort_of(lambda: Net(reduced)), "a model that talks to other processes")


class Drops(nn.Module):
    """A block left out at random, by Python's generator or one of its own."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x if self.draw() < 0.5 else 2 * x


class Gated(nn.Module):
    """Draws in training alone, by functions."""

    def forward(self, x):
        return F.dropout(x, 0.3, self.training)


def own_generator():
    net = Net(lambda net, x: x + torch.rand(1, generator=net.source, dtype=x.dtype))
    net.source = torch.Generator()
    return net


def drop_path():
    layers = pytest.importorskip("timm.layers")
    return Net(layers.DropPath(0.5))


def stochastic_depth():
    ops = pytest.importorskip("torchvision.ops")
    return Net(ops.StochasticDepth(0.5, "row"))


HIDDEN = random.Random(0)  # not an attribute of a module


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (drop_path, "DropPath, which draws a number for every image"),
        (stochastic_depth, "StochasticDepth, which draws"),
        (lambda: Net(nn.RReLU()), "a layer of type RReLU"),
        (lambda: Net(nn.Dropout2d()), "a layer of type Dropout2d"),
        (lambda: Net(nn.AlphaDropout()), "a layer of type AlphaDropout"),
        (lambda: Net(Gated()), r"a source of random numbers but nn.Dropout \(aten::bernoulli_"),
        (
            lambda: Net(lambda net, x: F.dropout(x, net.drop.p, net.drop.training)),
            r"a source of random numbers but nn.Dropout \(aten::bernoulli_",
        ),
        (
            lambda: Net(lambda net, x: x + torch.randn_like(x)),
            r"random numbers .*\(aten::randn_like",
        ),
        (own_generator, "a module with a random generator of its own"),
        (
            lambda: Net(lambda net, x: x + torch.rand(1, generator=torch.Generator())),
            r"random numbers but nn.Dropout \(aten::rand",
        ),
        (lambda: Net(Drops(lambda: random.random())), "a source of random numbers but"),
        (lambda: Net(Drops(lambda: np.random.rand())), "a source of random numbers but nn.Dropout"),
        (lambda: Net(Drops(np.random.rand)), "a module with a random generator of its own"),
        (lambda: Net(lambda net, x: x * HIDDEN.random()), "the way that Net combines"),
        (lambda: nn.Sequential(nn.Dropout(0.1), Net()), "the way that Sequential combines"),
        (
            lambda: Net(
                lambda net, x: (y := net.second(x)) + net.third(y),
                third=nn.Dropout(0.5, inplace=True),
            ),
            "the way that Net combines",
        ),
    ],
)
def test_randomness(build, message):
    assert_refused(cohort_of(build), message)


def frozen(cohort):
    for peer in cohort.peers:
        peer.norm.eval()


@pytest.mark.parametrize(
    ("build", "change", "reason"),
    [
        (tied, None, "not stacked: does not know a weight that is used twice"),
        (drop_path, None, "not stacked: does not know DropPath, which draws"),
        (stochastic_depth, None, "not stacked: does not know StochasticDepth, which draws"),
        (lambda: Net(Hidden()), None, "not stacked: does not know the way that Net combines"),
        (
            lambda: Net(lambda net, x: F.normalize(x, dim=1) if net.training else x),
            None,
            "not stacked: does not know the way that Net combines",
        ),
        (Net, lambda cohort: cohort.peers[1].eval(), "not stacked: needs peers in one mode"),
        (Net, frozen, None),
    ],
)
def test_auto_does_what_eager_does(capsys, build, change, reason):
    """And names in its line what cannot be stacked."""
    found = []
    for execution in ("eager", "auto"):
        cohort = cohort_of(build)
        lies = memory(cohort)
        step = stacked(cohort, execution=execution, threads=1)
        if change:
            change(cohort)
        torch.manual_seed(3)
        losses = [step(*batch(i)).losses for i in range(3)]
        found.append([*losses, *cohort.state_dict().values()])
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    if reason:
        assert line.startswith("execution: eager, 1 thread")
        assert reason in line
        assert memory(cohort) == lies
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8)


def test_auto_goes_on_as_eager_when_a_hook_comes(capsys):
    found = []
    for execution in ("eager", "auto", "stacked"):
        cohort = cohort_of(Net)
        own = saved_bytes(cohort.peers[0])
        step = stacked(cohort, execution=execution, threads=1)
        torch.manual_seed(3)
        step(*batch())
        calls = []
        cohort.peers[1].head.register_full_backward_hook(lambda *_, calls=calls: calls.append(1))
        if execution == "stacked":
            with pytest.raises(Unstackable):
                step(*batch(1))
            step = stacked(cohort, execution="eager")
        step(*batch(1))
        step(*batch(2))
        assert len(calls) == 2
        assert saved_bytes(cohort.peers[0]) == own
        found.append(cohort.state_dict().values())
    for a, b in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8)
    assert capsys.readouterr().err.count("\n") <= 2


def test_a_copied_step_goes_on_by_itself():
    cohort = cohort_of(Net)
    step = stacked(cohort)
    torch.manual_seed(0)
    step(*batch())
    twin = copy.deepcopy(step)
    generator, results = torch.get_rng_state(), []
    for one in (step, twin):
        torch.set_rng_state(generator)
        losses = [one(*batch(i)).losses for i in (1, 2)]
        results.append([*losses, *one.cohort.state_dict().values()])
    assert all(map(torch.equal, *results))
    assert not set(memory(step.cohort)) & set(memory(twin.cohort))


def test_shared_memory_of_processes():
    cohort = cohort_of(Net)
    cohort.peers[0].head.weight.share_memory_()
    assert_refused(cohort, r"a weight in memory that processes share \(head.weight\)")


def test_a_weight_that_does_not_fill_its_memory():
    cohort = cohort_of(Net)
    for peer in cohort.peers:
        peer.head.weight.data = torch.zeros(C, 8, dtype=torch.float64)[:, ::2].copy_(
            peer.head.weight
        )
    assert_refused(cohort, r"a weight of shape \(5, 4\) and strides \(8, 2\)")


def test_what_the_watch_asks_is_none_of_the_values():
    """Attributes that cannot be compared are compared by identity."""
    net = Net()
    net.table, net.grid = torch.ones(3), np.ones(3)
    watch = Watch([net])
    assert not watch.changed()
    net.grid = np.ones(3)
    assert watch.changed()
