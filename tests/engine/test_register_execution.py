"""An execution is one file and its registration: what is added here works through make_step."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import executions, make_optimizer, make_step, register_execution
from fastdml.engine.eager import EagerStep
from fastdml.engine.execution import EXECUTIONS, in_turn
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def toy():
    """Runs the last peer first."""

    @register_execution("toy", devices=("cpu",))
    class ToyStep(EagerStep):
        name = "toy"
        order: list[int]

        def outputs(self, images):
            self.order = [*reversed(range(len(self.peers)))]
            found = {k: self.forward(k, images) for k in self.order}
            return [found[k] for k in range(len(self.peers))]

    yield ToyStep
    del EXECUTIONS["toy"]


def setting():
    torch.manual_seed(0)
    cohort = Cohort([nn.Linear(6, 3) for _ in range(2)], 3)
    batch = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    return cohort, make_optimizer(cohort, lr=0.1), batch


def test_a_registered_execution_trains_as_the_others_do(toy):
    cohort, optimizer, batch = setting()
    step = make_step(cohort, MutualLoss(), optimizer, execution="toy", amp="off")
    assert type(step) is toy
    losses = step(*batch).losses
    assert step.order == [1, 0]
    other, optimizer, _ = setting()
    eager = make_step(other, MutualLoss(), optimizer, execution="eager", amp="off")
    assert torch.equal(losses, eager(*batch).losses)
    for name, value in cohort.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_auto_measures_it_beside_the_others_and_takes_it_where_it_is_fastest(toy, take, capsys):
    asked = take("toy", 1)
    cohort, optimizer, batch = setting()
    step = make_step(cohort, MutualLoss(), optimizer, amp="off", threads=1)
    step(*batch)
    assert step.name == "toy"
    assert [c.execution for c in asked[0]] == ["eager", "stacked", "toy"]
    assert capsys.readouterr().err.startswith("execution: toy, 1 thread (ms a step: eager on 1 ")


def test_what_speaks_against_it_keeps_it_out_of_the_choice(toy, take, capsys):
    del EXECUTIONS["toy"]
    register_execution("toy", unfit=lambda peers: f"not with {len(peers)} peers")(toy)
    asked = take("toy", 1)
    cohort, optimizer, batch = setting()
    make_step(cohort, MutualLoss(), optimizer, amp="off", threads=1)(*batch)
    assert "toy" not in [c.execution for c in asked[0]]
    assert "not toy: not with 2 peers" in capsys.readouterr().err


def test_devices_updates_and_names_come_from_the_registration(toy):
    assert executions(CPU) == ["eager", "threads", "stacked", "toy"]
    assert executions(CUDA) == ["eager", "streams", "graph", "stacked"]
    cohort, optimizer, _ = setting()
    with pytest.raises(InputError, match=r"'toy' does not go with update='sequential'.* use eager"):
        make_step(cohort, MutualLoss(), optimizer, execution="toy", update="sequential")
    with pytest.raises(InputError, match=r"use auto or eager, threads, .*, stacked, toy$"):
        make_step(cohort, MutualLoss(), optimizer, execution="warp")


def test_a_name_is_registered_once(toy):
    before = copy.copy(EXECUTIONS["toy"])
    for facts in ({}, {"devices": ("cuda",)}):
        with pytest.raises(ValueError, match="is registered already"):
            register_execution("toy", **facts)(toy)
    assert EXECUTIONS["toy"] == before
    with pytest.raises(TypeError, match="device"):
        register_execution("toys", device="cpu")(toy)
    assert "toys" not in EXECUTIONS


def test_every_file_of_the_package_that_registers_an_execution_is_known():
    """Also those that nobody imports but the package itself."""
    folder = os.path.dirname(make_step.__code__.co_filename)
    found = set()
    for name in os.listdir(folder):
        if name.endswith(".py") and name != "execution.py":
            with open(os.path.join(folder, name)) as file:
                lines = file.read().split("@register_execution(")[1:]
            found |= {line.split('"')[1] for line in lines}
    assert found == {e.name for e in in_turn()} == {*executions(CPU), *executions(CUDA)}
