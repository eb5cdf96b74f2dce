"""Every execution follows a temperature and a weight that are filled in place between steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastdml import MutualLoss, ScalarSchedule
from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step

from .small_runs import CPU, KINDS, C, Run, assert_same, batches, plain_batch, plain_peer

STEPS = 6


def schedules(device=CPU) -> dict[str, ScalarSchedule]:
    return {
        "temperature": ScalarSchedule(4.0, 2.0, steps=STEPS, kind="cosine", device=device),
        "kl_weight": ScalarSchedule(0.5, 2.0, steps=STEPS, device=device),
    }


class After:
    """What a run does after each step, and the schedules' advance with it."""

    def __init__(self, others, scheduled):
        self.others, self.scheduled = others, scheduled

    def __call__(self, output, update):
        self.others(output, update)
        for one in self.scheduled:
            one.advance(update.skipped)

    def tensors(self):
        return [*self.others.tensors(), *(t for one in self.scheduled for t in one.tensors())]


def followed(kind, *, inside: bool, **options) -> Run:
    """A run whose schedules advance in the loop, or inside its steps, where a graph holds them."""
    scheduled = schedules()
    loss = MutualLoss(**{name: one.value for name, one in scheduled.items()})

    def make(*arguments):
        *rest, given = arguments
        if inside:
            given = dataclasses.replace(given, after=After(given.after, [*scheduled.values()]))
        return KINDS[kind](*rest, given)

    run = Run(kind, loss=loss, make=make, **options)
    run.outputs = []
    for batch in batches(STEPS):
        run.outputs.append(run.step(*batch))
        if not inside:
            for one in scheduled.values():
                one.advance()
    return run


def with_numbers(kind, **options) -> Run:
    """The same run with the values assigned as numbers."""
    run = Run(kind, loss=MutualLoss(temperature=4.0, kl_weight=0.5), **options)
    run.outputs, scheduled = [], schedules()
    for batch in batches(STEPS):
        for name, one in scheduled.items():
            setattr(run.loss, name, float(one.value))
            one.advance()
        run.outputs.append(run.step(*batch))
    return run


@pytest.mark.parametrize("inside", [False, True], ids=["by the loop", "within the step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sees_each_value(kind, inside):
    assert_same(followed(kind, inside=inside).state(), with_numbers(kind).state())


@pytest.mark.parametrize("kind", KINDS)
def test_peer_weights_that_are_filled_in_place_are_followed_too(kind):
    def trained(kind, *, in_place: bool) -> Run:
        run = Run(kind, peers=(0, 1, 2), loss=MutualLoss(peer_weights=torch.ones(3, 3)))
        run.outputs = []
        for i, batch in enumerate(batches(STEPS)):
            weights = torch.roll(torch.eye(3), 1 + i // 2 % 2, 1)
            if in_place:
                run.loss.peer_weights.copy_(weights)
            else:
                run.loss.peer_weights = weights
            run.outputs.append(run.step(*batch))
        return run

    found = trained(kind, in_place=True)
    assert_same(
        found.state(),
        trained(kind.removesuffix("graph").strip() or "eager", in_place=False).state(),
    )
    if "graph" in kind:
        assert found.step.captured.calls == STEPS


def test_in_parts_and_in_half_precision_too():
    for options in ({"accumulate": 2}, {"precision": "fp16"}):
        found = followed("graph", inside=True, **options).state()
        assert_same(found, with_numbers("eager", **options).state())


@pytest.mark.parametrize("execution", ["threads", "auto"])
def test_what_a_cpu_chooses_from(execution):
    """The measurement of auto and the proof of threads advance nothing."""

    def trained(numbers: bool):
        cohort = Cohort([plain_peer(0, 4), plain_peer(1, 6)], C)
        scheduled = schedules()
        loss = MutualLoss(**{name: one.value for name, one in scheduled.items()})
        optimizer = make_optimizer(cohort, "sgd", lr=0.05)
        step = make_step(cohort, loss, optimizer, execution=execution, amp="off")
        losses = []
        for i in range(STEPS):
            if numbers:
                for name, one in scheduled.items():
                    setattr(loss, name, float(one.value))
            losses.append(step(*plain_batch(i)).losses)
            for one in scheduled.values():
                one.advance()
        return torch.stack(losses)

    torch.testing.assert_close(trained(False), trained(True), rtol=1e-5, atol=1e-6)
