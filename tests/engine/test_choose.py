"""execution="auto"."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import AutoStep, EagerStep, make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

CPU = torch.device("cpu")


class SlowStep:
    """A step that takes some milliseconds more and can do without a device."""

    def __init__(self, name, step, seconds, failure=None):
        self.name, self.step, self.seconds, self.failure = name, step, seconds, failure
        self.tensors = step.tensors

    def __call__(self, *batch):
        time.sleep(self.seconds)
        return self.step(*batch)


def setting():
    torch.manual_seed(0)
    peers = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)) for _ in range(2)]
    cohort = Cohort(peers, 3)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, "adam", lr=0.1), amp="off")
    return cohort, step, (torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))


def test_on_a_cpu_it_is_eager_without_measuring(capsys):
    _, step, batch = setting()
    assert type(step) is EagerStep
    step(*batch)
    assert capsys.readouterr() == ("", "")


def test_the_fastest_is_kept_and_measuring_leaves_no_trace(capsys):
    cohort, inner, batch = setting()
    made = []

    def make(name):
        made.append(name)
        if name == "stacked":
            raise InputError("different layers")
        failure = "cannot be captured" if name == "graph" else None
        return SlowStep(name, inner, {"eager": 0.02, "streams": 0.005, "graph": 0.0}[name], failure)

    step = AutoStep(["eager", "streams", "graph", "stacked"], make, CPU)
    with pytest.raises(AttributeError, match="chosen at the first step"):
        _ = step.name
    before, rng = copy.deepcopy(cohort.state_dict()), torch.get_rng_state()
    step(*batch)
    after = copy.deepcopy(cohort.state_dict())
    assert made == ["stacked", "eager", "streams", "graph"]  # stacking moves the weights
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


def test_a_mistake_that_stops_every_candidate_is_told(capsys):
    def make(name):
        raise InputError(f"{name} is wrong")

    step = AutoStep(["eager", "graph"], make, CPU)
    with pytest.raises(InputError, match="eager is wrong"):
        step(torch.zeros(1))
    assert capsys.readouterr().err == ""
