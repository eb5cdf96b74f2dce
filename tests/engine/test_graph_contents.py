"""A graph of what is no longer there is dropped: against the eager step, and a replay of a tape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs

from fastdml.cohort import Cohort
from fastdml.engine import Amp, Ema, make_optimizer
from fastdml.engine.eager import EagerStep
from fastdml.engine.execution import StepOptions
from fastdml.engine.graph import GraphStep
from fastdml.engine.sequential import SequentialStep
from fastdml.loss import MutualLoss

from .small_runs import CPU, C, plain_batch, plain_peer
from .test_replay import Loss, TapeCapture


class Setting:
    def __init__(self, graph, *, kind=EagerStep, frozen=False, name="sgd"):
        self.cohort = Cohort([plain_peer(0, 6), plain_peer(1, 6)], C).train()
        if frozen:
            for p in self.cohort.peers:
                p[:2].requires_grad_(False)
        self.optimizer = make_optimizer(self.cohort, name, lr=0.1, weight_decay=1e-3)
        self.loss, self.ema = Loss(), Ema(self.cohort, 0.9)
        options = StepOptions(ema=self.ema)
        step = kind(self.cohort, self.loss, self.optimizer, Amp(CPU, None, None), options)
        self.step = GraphStep(step, TapeCapture) if graph else step


def unfreeze(s):
    body = [w for p in s.cohort.peers for w in p[:2].parameters()]
    for w in body:
        w.requires_grad_(True)
    s.optimizer.add_param_group({"params": body})


def freeze(s):
    for p in s.cohort.peers:
        p[0].requires_grad_(False)


def frozen_statistics(s):
    for p in s.cohort.peers:
        p[1].eval()


def new_head(s):
    for k, (p, group) in enumerate(zip(s.cohort.peers, s.optimizer.param_groups, strict=True)):
        torch.manual_seed(k)
        old, p[5] = [id(w) for w in p[5].parameters()], nn.Linear(6, C)
        group["params"] = [w for w in group["params"] if id(w) not in old] + [*p[5].parameters()]


def new_memory(s):
    s.cohort.to(memory_format=torch.channels_last)


def settings(s):
    s.optimizer.param_groups[0]["weight_decay"] = 0.1


def no_momentum_yet(s):
    s.optimizer.state.clear()


def class_weight(s):
    s.loss.class_weight = torch.linspace(0.1, 2, C)


CHANGES = [unfreeze, freeze, frozen_statistics, new_head, new_memory, settings, no_momentum_yet,
           class_weight]  # fmt: skip


def found(setting, change, steps=8):
    losses = []
    for i in range(steps):
        if i == 3:
            change(setting)
        losses.append(setting.step(*plain_batch(i)).losses)
    state = setting.cohort.state_dict()
    moments = [v for state in setting.optimizer.state.values() for v in state.values()]
    return [*state.values(), *moments, *setting.ema.averages, torch.stack(losses)]


@pytest.mark.parametrize("kind", [EagerStep, SequentialStep], ids=lambda k: k.__name__)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_changes_between_steps_reaches_the_graph(change, kind):
    start = {"kind": kind, "frozen": change is unfreeze}
    graph = Setting(True, **start)
    got = found(graph, change)
    expected = found(Setting(False, **start), change)
    assert graph.step.failure is None
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if change is not new_memory:  # other kernels in another order
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_numbers_assigned_to_rates_are_no_reason_to_capture_anew(name):
    def train(graph):
        s = Setting(graph, name=name)
        captures = set()
        for i in range(6):
            s.optimizer.param_groups[0]["lr"] = 0.125 / (1 + i)
            s.optimizer.param_groups[1]["lr"] = 0.25
            s.step(*plain_batch(i))
            captures.add(getattr(s.step, "captured", None))
        return s.cohort.state_dict(), captures

    (got, captures), (expected, _) = train(True), train(False)
    assert len(captures) == 1
    assert all(torch.equal(got[k], v) for k, v in expected.items())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torchs.ReduceLROnPlateau(o, factor=0.5, patience=0),
        lambda o: torchs.LambdaLR(o, [lambda t: 0.9**t, lambda t: 0.5**t]),
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 3),
    ],
    ids=["ReduceLROnPlateau", "LambdaLR", "CosineAnnealingWarmRestarts"],
)
def test_torchs_schedulers_reach_the_graph(scheduler):
    def train(graph):
        s = Setting(graph)
        rates = scheduler(s.optimizer)
        captures = set()
        for i in range(8):
            s.step(*plain_batch(i))
            rates.step(*[1.0] * isinstance(rates, torchs.ReduceLROnPlateau))
            captures.add(getattr(s.step, "captured", None))
        return s.cohort.state_dict(), captures

    (got, captures), (expected, _) = train(True), train(False)
    assert len(captures) == 1
    assert all(torch.equal(got[k], v) for k, v in expected.items())


def test_where_every_step_is_another_one_there_is_no_graph():
    """OneCycleLR moves the momentum too, which a graph would freeze."""
    results = []
    for graph in (False, True):
        s = Setting(graph)
        rates = torchs.OneCycleLR(s.optimizer, 0.5, total_steps=12)
        for i in range(10):
            if graph and i == 3:
                with pytest.warns(UserWarning, match="a setting of the optimizer changed 3 times"):
                    s.step(*plain_batch(i))
            else:
                s.step(*plain_batch(i))
            rates.step()
        results.append(s.cohort.state_dict())
    assert s.step.captured is None
    assert all(torch.equal(results[1][k], v) for k, v in results[0].items())


class Replacing(nn.Module):
    """Keeps a moving statistic as many do by hand: a new tensor at each step."""

    def __init__(self, seed):
        super().__init__()
        self.net = plain_peer(seed, 6)
        self.register_buffer("centre", torch.zeros(C))

    def forward(self, x):
        z = self.net(x)
        self.centre = 0.9 * self.centre + 0.1 * z.detach().mean(0)
        return z - self.centre


def test_peers_that_replace_their_buffers_run_without_a_graph_and_keep_them():
    results = []
    for graph in (False, True):
        cohort = Cohort([Replacing(0), Replacing(1)], C)
        optimizer = make_optimizer(cohort, lr=0.1)
        step = EagerStep(cohort, MutualLoss(), optimizer, Amp(CPU, None, None), StepOptions())
        if graph:
            step = GraphStep(step, TapeCapture)
            start = copy.deepcopy(cohort.state_dict())
            with pytest.warns(UserWarning, match="new tensors in the places of its buffers"):
                step._capture(plain_batch(0))
            assert all(torch.equal(v, start[k]) for k, v in cohort.state_dict().items())
        for i in range(4):
            step(*plain_batch(i))
        results.append(cohort.state_dict())
    assert all(torch.equal(results[1][k], v) for k, v in results[0].items())
