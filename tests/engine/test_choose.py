"""execution="auto"."""

from __future__ import annotations

import copy
import time
import weakref

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.choose import AutoStep
from fastdml.engine.stacked import StackedStep
from fastdml.engine.step import EagerStep, SequentialStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

CPU = torch.device("cpu")


class SlowStep:
    """A step that takes some milliseconds more and can do without a device."""

    def __init__(self, name, step, seconds, failure=None):
        self.name, self.step, self.seconds, self.failure = name, step, seconds, failure
        self.tensors, self.loss, self.cohort = step.tensors, step.loss, step.cohort

    def __call__(self, *batch):
        self.loss.kl_weight = torch.tensor(1.0)
        time.sleep(self.seconds)
        return self.step(*batch)


def setting():
    torch.manual_seed(0)
    peers = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)) for _ in range(2)]
    cohort = Cohort(peers, 3)
    optimizer = make_optimizer(cohort, "adam", lr=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
    return cohort, step, (torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))


def cnn(width=4, mixing=False):
    layers = [nn.Conv2d(2, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *[nn.Softmax(1)] * mixing, nn.Linear(width, 3))


@pytest.mark.parametrize(
    ("peers", "n", "options", "kind"),
    [
        ((cnn, cnn), 8, {}, StackedStep),
        ((cnn, cnn), 65, {}, EagerStep),  # of 8x8 pixels: not small any more
        ((cnn,), 8, {}, EagerStep),
        ((cnn, lambda: cnn(5)), 8, {}, EagerStep),
        ((lambda: cnn(mixing=True),) * 2, 8, {}, EagerStep),
        ((cnn, cnn), 8, {"update": "sequential"}, SequentialStep),
        ((cnn, cnn), 8, {"amp": "bf16"}, EagerStep),
    ],
)
def test_on_a_cpu_a_rule_decides(capsys, peers, n, options, kind):
    cohort = Cohort([p() for p in peers], 3)
    options = {"amp": "off", **options}
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), **options)
    step(torch.randn(n, 2, 8, 8), torch.zeros(n, dtype=torch.int64))
    chosen = step.chosen if isinstance(step, AutoStep) else step
    assert type(chosen) is kind
    line = capsys.readouterr().err
    if isinstance(step, AutoStep):
        assert line == (
            "execution: stacked (a small batch on a CPU)\n"
            if kind is StackedStep
            else "execution: eager\n"
        )
    else:
        assert line == ""


def test_the_fastest_is_kept_and_measuring_leaves_no_trace(capsys, monkeypatch):
    cohort, inner, batch = setting()
    made = []

    def make(name):
        made.append(name)
        if name == "stacked":
            raise InputError("different layers")
        failure = "cannot be captured" if name == "graph" else None
        return SlowStep(name, inner, {"eager": 0.02, "streams": 0.005, "graph": 0.0}[name], failure)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(AutoStep, "_rule", AutoStep._measure)  # as if on CUDA
    step = AutoStep(["eager", "streams", "graph", "stacked"], make, CPU)
    with pytest.raises(AttributeError, match="chosen at the first step"):
        _ = step.name
    before, rng = copy.deepcopy(cohort.state_dict()), torch.get_rng_state()
    step._measure(batch)
    assert inner.loss.kl_weight == 1
    assert type(inner.loss.kl_weight) is float
    made.clear()
    capsys.readouterr()
    step(*batch)
    after = copy.deepcopy(cohort.state_dict())
    assert made == ["eager", "streams", "stacked", "graph"]  # stacking moves the weights
    assert step.name == "streams"
    line = capsys.readouterr().err
    assert line.startswith("execution: streams (ms a step: eager ")
    assert line.count("\n") == 1
    assert "stacked" not in line
    assert "graph" not in line  # it fell back
    cohort.load_state_dict(before)
    torch.set_rng_state(rng)
    other, again, _ = setting()
    torch.set_rng_state(rng)
    again(*batch)
    for key, value in other.state_dict().items():
        assert torch.equal(value, after[key])
    step(*batch)
    assert made[4:] == []


def test_a_candidate_is_gone_before_the_next_is_measured(monkeypatch):
    """A graph keeps the memory of a step: only the best so far may hold it."""
    _, inner, batch = setting()
    alive = weakref.WeakSet()

    def make(name):
        seconds = {"eager": 0.004, "streams": 0.02, "stacked": 0.0, "graph": 0.01}[name]
        assert {step.name for step in alive} <= {"eager", "stacked"}
        step = SlowStep(name, inner, seconds)
        alive.add(step)
        return step

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(AutoStep, "_rule", AutoStep._measure)
    step = AutoStep(["eager", "streams", "graph", "stacked"], make, CPU)
    step(*batch)
    assert {step.name for step in alive} == {"stacked"} == {step.name}


def test_an_optimizer_that_counts_on_the_host_is_not_measured(capsys):
    """What steps leave in Python numbers could not be restored."""
    cohort, _, batch = setting()
    kind = type("FusedSGD", (torch.optim.SGD,), {"__module__": "apex.optimizers.fused_sgd"})
    optimizer = kind(cohort.parameters(), 0.5)
    step = make_step(cohort, MutualLoss(), optimizer, amp="off")
    assert type(step) is EagerStep
    assert capsys.readouterr().err == "execution: eager (FusedSGD counts on the host)\n"
    step(*batch)


def test_a_mistake_that_stops_every_candidate_is_told(capsys, monkeypatch):
    def make(name):
        raise InputError(f"{name} is wrong")

    monkeypatch.setattr(AutoStep, "_rule", AutoStep._measure)
    step = AutoStep(["eager", "graph"], make, CPU)
    with pytest.raises(InputError, match="eager is wrong"):
        step(torch.zeros(1))
    assert capsys.readouterr().err == ""
