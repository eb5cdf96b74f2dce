"""Sums on the device against plain means, and the clock."""

from __future__ import annotations

import math

import pytest
import torch

from fastdml.engine import StepOutput
from fastdml.loss import MutualStats
from fastdml.train.meters import Clock, Totals

CPU = torch.device("cpu")


def output(K: int, generator: torch.Generator) -> StepOutput:
    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    stats = MutualStats(
        ce=rand(K),
        kl=rand(K),
        pairwise_kl=rand(K, K),
        entropy=rand(K),
        correct=(9 * rand(K)).floor(),
        ensemble_correct=(9 * rand(())).floor(),
    )
    stats.packed[stats.layout.labelled] = 10
    return StepOutput(rand(K), stats)


@pytest.mark.parametrize("K", [1, 3])
def test_means_since_the_last_read_and_over_the_epoch(K):
    generator = torch.Generator().manual_seed(0)
    outputs = [output(K, generator) for _ in range(7)]
    totals = Totals(K, CPU)

    def expected(part):
        rows = 10 * len(part)

        def mean(values):
            return torch.stack(values).double().mean(0).tolist()

        return {
            "loss": mean([o.losses for o in part]),
            "ce": mean([o.stats.ce for o in part]),
            "kl": mean([o.stats.kl for o in part]),
            "entropy": mean([o.stats.entropy for o in part]),
            "top1": (sum(o.stats.correct for o in part) / rows).tolist(),
            "ensemble_top1": (sum(o.stats.ensemble_correct for o in part) / rows).item(),
            "pairwise_kl": mean([o.stats.pairwise_kl for o in part]),
        }

    def close(found, wanted):
        assert found.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(
                torch.tensor(found[key]), torch.tensor(wanted[key]), rtol=1e-6, atol=1e-7
            )

    for step, o in enumerate(outputs, 1):
        totals.add(o)
        totals.count()
        if step == 3:
            close(totals.read(), expected(outputs[:3]))
            assert totals.unread == 0
        if step == 5:  # saved and loaded in between
            state = totals.state()
            totals = Totals(K, CPU)
            totals.load(state)
    assert totals.unread == 4
    close(totals.read(), expected(outputs[3:]))
    close(totals.epoch(), expected(outputs))
    totals.reset()
    assert totals.unread == 0
    totals.add(outputs[0])
    totals.count()
    close(totals.read(), expected(outputs[:1]))


def test_shares_are_of_the_rows_with_a_label_and_earlier_states_had_one_each():
    o = output(2, torch.Generator().manual_seed(1))
    o.stats.packed[o.stats.layout.labelled] = 4
    totals = Totals(2, CPU)
    totals.add(o)
    totals.count()
    right = o.stats.correct.double()
    assert totals.read()["top1"] == (right / 4).tolist()
    assert totals.epoch()["ensemble_top1"] == float(o.stats.ensemble_correct / 4)

    state = totals.state()  # as before: no count of labels among the sums, and rows on the host
    state |= {name: state[name][:-1] for name in ("sums", "marked_sums")}
    state["counts"] = [1, 20, 0, 0]
    state["marked_sums"] = torch.zeros_like(state["sums"])
    totals = Totals(2, CPU)
    totals.load(state)
    assert totals.epoch()["top1"] == (right / 20).tolist()
    assert totals.read()["top1"] == totals.epoch()["top1"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("loss", "peer"), [("ce", 0), ("ce", 2), ("kl", 1)])
def test_the_first_bad_loss_is_remembered(value, loss, peer):
    generator = torch.Generator().manual_seed(0)
    totals = Totals(3, CPU)
    for step in range(1, 8):
        o = output(3, generator)
        if step >= 4:
            getattr(o.stats, loss)[peer] = value
        if step >= 5:  # what follows from it
            o.stats.ce.fill_(math.nan)
            o.stats.kl.fill_(math.nan)
        totals.add(o)
        if step == 3:
            assert totals.bad() is None
    assert totals.bad() == (4, loss, peer)
    totals.reset()
    assert totals.bad() == (4, loss, peer)


def test_of_one_step_the_cross_entropy_is_named_first():
    o = output(3, torch.Generator().manual_seed(0))
    o.stats.kl.fill_(math.nan)  # a peer without probabilities spoils the KL of all
    o.stats.ce[1] = math.nan
    totals = Totals(3, CPU)
    totals.add(o)
    assert totals.bad() == (1, "ce", 1)


def test_the_clock_leaves_out_first_steps_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock(CPU, skip=2)

    def steps(count, wait, work):
        for _ in range(count):
            clock.ask()
            now[0] += wait
            clock.got()
            now[0] += work
            clock.step(10)

    clock.start()
    steps(2, 50, 50)  # start-up
    assert clock.images_per_second == 0
    steps(3, 1, 3)
    clock.stop()
    now[0] += 1000  # evaluation
    clock.start()
    steps(1, 1, 3)
    clock.stop()
    assert clock.images_per_second == pytest.approx(40 / 16)
    assert clock.data_wait == pytest.approx(0.25)
    other = Clock(CPU)
    other.load(clock.state())
    assert other.images_per_second == clock.images_per_second
