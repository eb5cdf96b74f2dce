"""Every execution takes the steps that the eager one takes; on CUDA: `test_executions_on_cuda`."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Amp, make_optimizer, make_step
from fastdml.engine.amp import LossScale
from fastdml.engine.streams import StreamsStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

from .small_runs import CASES, SIDE, C, Run, assert_same, batches, peer


class TestStacked:
    @pytest.mark.parametrize("options", [CASES[0], CASES[3], CASES[5]], ids=str)
    @pytest.mark.parametrize("peers", [(0, 1), (0, 1, 2)])
    def test_fifty_steps_follow_the_eager_ones(self, options, peers):
        """With BatchNorm statistics and dropout, to rounding: 50 steps magnify it."""
        eager = Run("eager", peers=peers, **options).train()
        stacked = Run("stacked", peers=peers, **options).train()
        a, b = eager.state(), stacked.state()
        assert a.keys() == b.keys()
        for name in a:
            loose = {"correct": 1.5, "ensemble_correct": 1.5}.get(name, 2e-3)
            torch.testing.assert_close(b[name], a[name], rtol=2e-3, atol=loose)

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: setattr(p[1], "momentum", 0.5),
            lambda p: setattr(p[8], "p", 0.5),
            lambda p: p[4].eval(),
            lambda p: p[0].requires_grad_(False),
        ],
    )
    def test_captured_steps_follow_what_changes_in_the_peers(self, change):
        runs = []
        for kind in ("eager", "stacked graph"):
            runs.append(run := Run(kind))
            run.outputs = []
            for i, batch in enumerate(batches(8)):
                if i == 4:
                    for p in run.cohort.peers:
                        change(p)
                run.outputs.append(run.step(*batch))
        eager, graph = (run.state() for run in runs)
        assert runs[1].step.captured.calls == 4
        for name, value in eager.items():
            torch.testing.assert_close(graph[name], value, rtol=1e-3, atol=1e-4)

    def test_a_captured_step_notices_hooks(self):
        run = Run("stacked graph").train(2)
        calls = []
        run.cohort.peers[1].register_forward_hook(lambda *_: calls.append(1))
        before = copy.deepcopy(run.cohort.state_dict())
        with pytest.raises(InputError, match="'stacked' does not know a module with hooks"):
            run.train(1)
        assert_same(run.cohort.state_dict(), before)
        assert not calls

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_in_half_precision(self, precision):
        eager = Run("eager", precision=precision).train(5)
        stacked = Run("stacked", precision=precision).train(5)
        for a, b in zip(*(r.cohort.parameters() for r in (eager, stacked)), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)

    def test_a_peer_that_overflows_skips_its_own_update(self):
        run = Run("stacked", precision="fp16")
        with torch.no_grad():  # logits that fp16 holds, gradients times the scale that it does not
            run.cohort.peers[1][9].weight[0] = 500
        before = [copy.deepcopy(p.state_dict()) for p in run.cohort.peers]
        run.train(1)
        assert run.step.update.overflow.tolist() == [0.0, 1.0]
        for key, w in run.cohort.peers[1].named_parameters():
            assert torch.equal(w, before[1][key])
        for key, w in run.cohort.peers[0].named_parameters():
            assert not torch.equal(w, before[0][key])


class FakeStream:
    """Records what waits for what."""

    log: list = []  # noqa: RUF012
    now = None

    def __init__(self, name="main"):
        self.name = name

    def wait_stream(self, other):
        FakeStream.log.append((self.name, "waits for", other.name))


def test_streams_fork_and_join_around_forward_and_backward(monkeypatch):
    """What runs where and who waits for whom, without a device."""
    FakeStream.log, names, main = [], iter("ab"), FakeStream()
    FakeStream.now = main

    @contextlib.contextmanager
    def stream(chosen):
        was, FakeStream.now = FakeStream.now, chosen
        yield
        FakeStream.now = was

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.now)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    eager = Run("eager").train(10)
    run = Run("", make=StreamsStep)
    for k, p in enumerate(run.cohort.peers):
        p.register_forward_hook(
            lambda *_, k=k: FakeStream.log.append((FakeStream.now.name, "forward", k))
        )
    run.optimizer.register_step_pre_hook(
        lambda *_: FakeStream.log.append((FakeStream.now.name, "update", None))
    )
    run.train(1)
    assert FakeStream.log == [
        ("a", "waits for", "main"), ("a", "forward", 0),
        ("b", "waits for", "main"), ("b", "forward", 1),
        ("main", "waits for", "a"), ("main", "waits for", "b"),  # before the loss
        ("main", "waits for", "a"), ("main", "waits for", "b"),  # after the backward
        ("main", "update", None),
    ]  # fmt: skip
    names = iter("ab")
    run = Run("", make=StreamsStep).train(10)
    assert_same(run.state(), eager.state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"execution": "graph"},
            "'graph' needs a CUDA device, not cpu: use eager or threads or stacked",
        ),
        ({"execution": "streams"}, "'streams' needs a CUDA device"),
        ({"execution": "stacked", "update": "sequential"}, "'stacked' does not go with update="),
        ({"accumulate": 0}, "accumulate must be 1 or more, not 0"),
        ({"accumulate": 2, "update": "sequential"}, "does not go with update='sequential'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    cohort = Cohort([peer(0), peer(1)], C)
    with pytest.raises(InputError, match=message):
        make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), **options)


def test_accumulated_parts_are_the_whole_batch_without_batch_norm():
    """The mean of the parts' gradients is the gradient; counts and means are the batch's."""
    states = []
    for parts in (1, 4):
        torch.manual_seed(0)
        peers = [nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, C)) for _ in range(2)]
        cohort = Cohort(peers, C)
        optimizer = make_optimizer(cohort, lr=0.1)
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", accumulate=parts)
        outputs = [step(*batch) for batch in batches(5)]
        states.append([*cohort.parameters(), *(o.losses for o in outputs),
                       *(v for o in outputs for v in o.stats)])  # fmt: skip
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_fp16_scale_is_shared_and_flags_are_not():
    run = Run("eager", precision="fp16", peers=(0, 1, 2))
    assert isinstance(run.amp, Amp)
    assert isinstance(run.amp.scaler, LossScale)
    assert run.step.update.overflow.shape == (3,)
