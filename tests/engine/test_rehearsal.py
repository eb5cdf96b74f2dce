"""What is measured on a CPU, in which order, for how long, and what is concluded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdml.engine import cpus, rehearsal
from fastdml.engine.rehearsal import Candidate, Rehearsal, candidates, fastest
from fastdml.errors import InputError

LAYERS = 10


def listed(text: str) -> list[Candidate]:
    """ "eager 1, threads 2" """
    return [Candidate(c.split()[0], int(c.split()[1])) for c in text.split(", ")]


@pytest.mark.parametrize(
    ("executions", "peers", "most", "threads", "expected"),
    [
        ("eager threads stacked", 2, 2, None, "eager 1, eager 2, threads 2, stacked 1, stacked 2"),
        (
            "eager threads stacked", 4, 16, None,
            "eager 1, eager 4, eager 16, threads 4, threads 16, stacked 1, stacked 4, stacked 16",
        ),
        ("eager threads", 2, 3, None, "eager 1, eager 2, eager 3, threads 2"),  # shares of one
        ("eager threads stacked", 4, 2, None, "eager 1, eager 2, stacked 1, stacked 2"),
        ("eager threads stacked", 2, 1, None, "eager 1, stacked 1"),
        ("eager threads stacked", 2, 8, 1, "eager 1, stacked 1"),  # asked for
        ("eager threads stacked", 2, 8, 6, "eager 6, threads 6, stacked 6"),
        ("eager", 1, 8, None, "eager 1, eager 8"),
        ("threads", 4, 2, None, "threads 2"),  # asked for, with fewer cores than peers
        ("threads", 2, 8, None, "threads 2, threads 8"),
    ],
)  # fmt: skip
def test_candidates(monkeypatch, executions, peers, most, threads, expected):
    monkeypatch.setattr(cpus, "most", lambda: most)
    assert candidates(executions.split(), peers, threads) == listed(expected)


def test_a_margin_keeps_the_simplest():
    one, two, three = listed("eager 1, eager 2, stacked 1")
    assert fastest({one: 10.0, two: 9.5, three: 9.1}) == one
    assert fastest({one: 10.0, two: 9.5, three: 8.8}) == two
    assert fastest({one: 10.0, two: 9.9, three: 5.0}) == three


class Layer(nn.Module):
    def forward(self, x):
        world.now += world.seconds / (2 * LAYERS)  # half of a step is the forward pass
        return x


world = SimpleNamespace()


class Step:
    """A step whose time is known, on a clock that it moves itself."""

    def __init__(self, name):
        self.name = name
        self.cohort = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def __call__(self, x):
        key = Candidate(self.name, torch.get_num_threads())
        world.calls.append(key)
        times = world.times[key]
        if isinstance(times, Exception):
            raise times
        world.seconds = times if isinstance(times, float) else next(times)
        if self.name == "stacked":
            world.now += world.seconds
            return
        self.cohort(x)
        world.now += world.seconds / 2


@pytest.fixture
def measured(monkeypatch):
    """Runs a rehearsal of steps that take so many seconds."""

    def run(times: dict[str, object]) -> Rehearsal:
        world.now, world.calls = 0.0, []
        world.times = dict(zip(listed(", ".join(times)), times.values(), strict=True))
        clock = SimpleNamespace(perf_counter=lambda: world.now)
        monkeypatch.setattr(rehearsal, "time", clock)
        found = Rehearsal(lambda: Step, (torch.zeros(1),))
        found.run(list(world.times))
        assert found.times.keys().isdisjoint(found.late)
        return found

    return run


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"eager 1": 0.010, "eager 2": 0.006, "threads 2": 0.0055}, "eager 2"),
        ({"eager 1": 0.010, "eager 2": 0.008, "threads 2": 0.006}, "threads 2"),
        ({"eager 1": 0.010, "eager 2": 2.0, "threads 2": 0.02, "stacked 1": 0.008}, "stacked 1"),
        ({"eager 1": 0.4, "eager 8": 0.05, "threads 2": 0.2, "threads 8": 0.04}, "threads 8"),
        ({"eager 4": 0.02, "stacked 4": 0.019}, "eager 4"),
    ],
    ids=str,
)
def test_the_fastest_is_found(measured, times, best):
    assert fastest(measured(times).times) == listed(best)[0]
    assert world.now < 1.2 * rehearsal.BUDGET


def test_threads_that_wait_in_vain_cost_a_moment(measured):
    """Steps of milliseconds that take seconds where the cores are busy are given up in the middle,
    and what would do the same is not tried."""
    found = measured(
        {"eager 1": 0.01, "eager 2": 3.0, "threads 2": 0.009, "stacked 1": 0.01, "stacked 2": 4.0}
    )
    assert found.late == listed("eager 2")
    assert Candidate("stacked", 2) not in world.calls
    assert world.now < 1.0


def test_one_bad_moment_decides_nothing(measured):
    def noisy():  # the first step, which proves something, and the second; then rounds
        yield from [0.3, 0.008, 0.011, 0.02, 0.008, 0.008, 0.008]

    found = measured({"eager 1": 0.012, "stacked 1": noisy()})
    assert found.times[Candidate("stacked", 1)] == pytest.approx(0.008)
    assert fastest(found.times) == Candidate("stacked", 1)


def test_a_proof_is_no_part_of_a_step(measured):
    """However long it takes."""

    def stacked():
        yield from [4.0, 0.01]

    found = measured({"eager 1": 0.02, "stacked 1": stacked(), "stacked 2": 0.1})
    assert world.calls == listed("eager 1, eager 1, stacked 1, stacked 1")
    assert list(found.times.values()) == pytest.approx([0.02, 0.01])


def test_what_is_fast_now_and_then_is_out_once_it_is_late(measured):
    """A second thread is fine until its core is taken."""

    def bimodal():
        yield from [0.02, 0.006, 0.006, 0.006, 0.9, 0.006, 0.9]

    found = measured({"eager 1": 0.01, "eager 2": bimodal()})
    assert found.late == listed("eager 2")
    assert fastest(found.times) == Candidate("eager", 1)


def test_slow_models_take_a_step_each(measured):
    found = measured(
        {"eager 1": 64.0, "eager 2": 32.0, "eager 16": 5.0, "threads 2": 33.0, "threads 16": 4.0,
         "stacked 1": 60.0, "stacked 16": 6.0}
    )  # fmt: skip
    assert world.calls == listed("eager 1, eager 2, eager 16, threads 2, threads 16")
    assert found.late == listed("eager 1, threads 2")  # the first after a second
    assert fastest(found.times) == Candidate("threads", 16)


def test_rounds_of_steps_that_are_neither_fast_nor_slow(measured):
    """Some, where the first steps took less than eight of the fastest."""

    def loaded():  # by others, at first
        yield from [1.9, *[0.5] * 9]

    found = measured({"eager 1": 0.9, "eager 2": 0.7, "threads 2": loaded()})
    assert len(world.calls) == 4 + 3
    assert fastest(found.times) == Candidate("threads", 2)


def test_a_slow_model_on_one_thread_alone_is_not_given_up(measured):
    found = measured({"eager 1": 64.0, "stacked 1": 50.0})
    assert world.calls == listed("eager 1")
    assert fastest(found.times) == Candidate("eager", 1)


@pytest.mark.parametrize("error", [InputError("does not\nfit"), RuntimeError("out of memory")])
def test_what_does_not_fit_is_left_out_with_its_reason(measured, error):
    found = measured({"eager 1": 0.01, "threads 2": error, "stacked 1": 0.005})
    assert found.unfit == {"threads": " ".join(str(error).split())}
    assert found.times.keys() == set(listed("eager 1, stacked 1"))


def test_what_the_simplest_cannot_do_either_is_told(measured):
    with pytest.raises(InputError, match="too many channels"):
        measured({"eager 1": InputError("too many channels"), "stacked 1": 0.1})
