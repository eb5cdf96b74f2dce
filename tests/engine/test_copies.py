"""Copies and pickles of steps go on as the step itself would, and touch nothing of it."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch

from fastdml.cohort import Cohort
from fastdml.engine import Ema, Schedule, make_optimizer, make_step
from fastdml.engine.graph import GraphStep
from fastdml.loss import MutualLoss

from .small_runs import C, DirectCapture, plain_batch, plain_peer


class After:
    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, output, update):
        self.schedule.advance(update.skipped)

    def tensors(self):
        return self.schedule.tensors()


def pick(out):
    return out


def made(execution="eager", *, name="sgd", **options):
    cohort = Cohort([plain_peer(0, 4), plain_peer(1, 4)], C)
    optimizer = make_optimizer(cohort, name, lr=0.1, weight_decay=1e-3)
    options = {"amp": "off", **options}
    if options.pop("run", False):
        options["ema"] = Ema(cohort, 0.5)
        options["after"] = After(Schedule(optimizer, torch.linspace(0.1, 0.01, 8)))
    loss = MutualLoss(label_smoothing=0.1)
    if execution == "graph":
        step = make_step(cohort, loss, optimizer, execution="eager", **options)
        return GraphStep(step, DirectCapture)
    return make_step(cohort, loss, optimizer, execution=execution, **options)


def inner_of(step):
    step = getattr(step, "chosen", None) or getattr(step, "make", step)
    return getattr(step, "inner", step)


def state(step) -> dict[str, torch.Tensor]:
    inner = inner_of(step)
    found = {k: v.clone() for k, v in inner.cohort.state_dict().items()}
    for i, values in enumerate(inner.optimizer.state.values()):
        found |= {f"{i}.{k}": v.clone() for k, v in values.items()}
    for i, group in enumerate(inner.optimizer.param_groups):
        found[f"lr.{i}"] = torch.as_tensor(group["lr"]).clone()
    if inner.options.ema is not None:
        found |= {f"ema.{k}": v.clone() for k, v in inner.options.ema.state_dict().items()}
    if inner.amp.scaler is not None:
        found["scale"] = inner.amp.scaler.scale.clone()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CASES = [
    ("eager", {}),
    ("eager", {"run": True, "amp": "fp16", "name": "adam"}),
    ("eager", {"update": "sequential", "accumulate": 1, "grad_clip": 0.1}),
    ("eager", {"output": pick, "accumulate": 2}),
    ("threads", {"run": True}),
    ("stacked", {"run": True}),
    ("graph", {"run": True, "name": "adamw"}),
    ("auto", {"run": True}),
]


def named(value: str | dict) -> str:
    return value if isinstance(value, str) else "-".join(value) or "plain"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize(("execution", "options"), CASES, ids=named)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_goes_on_alone(way, execution, options, steps, capfd):
    torch.use_deterministic_algorithms(execution == "auto")  # chosen by a rule
    try:
        step = made(execution, **options)
        for i in range(steps):
            step(*plain_batch(i))
        twin = way(step)
        assert type(twin) is type(step)
        before = state(step)
        assert_same(state(twin), before)
        for i in range(2, 5):
            twin(*plain_batch(i))
        assert_same(state(step), before)  # untouched
        for i in range(2, 5):
            step(*plain_batch(i))
        found, expected = state(twin), state(step)
        assert_same(found, expected)
        assert not torch.equal(expected["peers.0.0.weight"], before["peers.0.0.weight"])
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_copy_of_many_things_at_once_keeps_what_they_share():
    step = made(run=True)
    step(*plain_batch(0))
    cohort = step.cohort
    both = copy.deepcopy({"step": step, "cohort": cohort, "optimizer": step.optimizer})
    assert both["step"].cohort is both["cohort"] is not cohort
    assert both["step"].optimizer is both["optimizer"]
    assert isinstance(both["optimizer"].state, defaultdict)
    held = {id(w) for group in both["optimizer"].param_groups for w in group["params"]}
    assert held == {id(w) for w in both["cohort"].parameters()}


def test_a_step_that_is_not_chosen_yet_answers_for_itself():
    step = made("auto")
    with pytest.raises(AttributeError, match="'update': the execution is chosen at the first step"):
        _ = step.update
    blank = type(step).__new__(type(step))  # as copy and pickle begin
    assert not any(hasattr(blank, name) for name in ("__deepcopy__", "__setstate__", "update"))


def test_what_cannot_be_pickled_is_pickles_own_line():
    step = made(output=lambda out: out)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda") as caught:
        pickle.dumps(step)
    assert "\n" not in str(caught.value)
    assert torch.equal(
        state(copy.deepcopy(step))["peers.0.0.weight"], state(step)["peers.0.0.weight"]
    )
