"""Peers side by side in host threads: the eager step's bits, and who may run so."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fastdml import Cohort, MetricLoss, MutualLoss
from fastdml.engine import Ema, executions, make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.models import ReidHead

C, STEPS = 5, 50


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batches(steps, side=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        labels = torch.randint(C, (8,), generator=generator)
        x = torch.randn(8, 3, side, side, generator=generator)
        yield (x + labels[:, None, None, None]).to(memory_format=torch.channels_last), labels


def train(execution, peers=("resnet8", "resnet8"), steps=STEPS, head=None, **options):
    """Losses of every step, weights and buffers at the end."""
    cohort = Cohort(peers, C, seed=3, head=head).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(cohort, "sgd", lr=0.05, momentum=0.9, weight_decay=1e-3)
    options = {"amp": "off", **options}
    if options.pop("average", None):
        options["ema"] = Ema(cohort, 0.9)
    if head:
        dims = [peer.num_features for peer in cohort.peers]
        options["metric"] = MetricLoss(num_classes=C, dims=dims, triplet=1.0, center=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, execution=execution, **options)
    losses = [step(*batch).losses for batch in batches(steps)]
    found = {f"loss.{i}": loss for i, loss in enumerate(losses)} | cohort.state_dict()
    if "ema" in options:
        found |= {f"ema.{k}": v for k, v in options["ema"].state_dict().items()}
    return found


def eager_on_one_core(*arguments, **options):
    torch.set_num_threads(1)
    found = train("eager", *arguments, **options)
    torch.set_num_threads(2)
    return found


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (STEPS, {}),
        (10, {"accumulate": 2, "grad_clip": 0.5, "average": True}),
        (10, {"peers": ("resnet8", "wrn_10_1", "resnet8")}),
        (10, {"head": ReidHead()}),
        (10, {"amp": "fp16"}),
    ],
    ids=str,
)
def test_the_bits_of_the_eager_step(steps, options):
    """Running statistics included; each peer has one core, so eager has one as well."""
    ours = train("threads", steps=steps, **options)
    theirs = eager_on_one_core(steps=steps, **options)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_peers_are_side_by_side():
    """Each waits for the other in the middle of its pass: one after the other would never end."""
    barrier, met = threading.Barrier(2, timeout=20), []

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, C)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:  # at the first step peers are looked at one by one
                barrier.wait()
                met.append(torch.get_num_threads())
            return self.linear(x.flatten(1))

    train("threads", [Meeting(), Meeting()], steps=3)
    assert met == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2


def test_a_peer_without_weights_to_train():
    cohort = Cohort(["resnet8", "resnet8"], C)
    cohort.peers[1].requires_grad_(False)
    optimizer = make_optimizer(cohort, "sgd", lr=0.1, weight_decay=0.0)
    before = [w.clone() for w in cohort.peers[0].parameters()]
    step = make_step(cohort, MutualLoss(), optimizer, execution="threads", amp="off")
    step(*next(batches(1)))
    assert not all(map(torch.equal, before, cohort.peers[0].parameters()))
    assert all(w.grad is None for w in cohort.peers[1].parameters())


def test_peers_that_draw_random_numbers_are_refused():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, C)

        def forward(self, x):
            return self.linear(nn.functional.dropout(x.flatten(1), 0.1))

    with pytest.raises(InputError, match="draw random numbers"):
        train("threads", [Draws(), Draws()], steps=1)


def test_an_error_in_a_peer_reaches_the_caller():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(3 * 8 * 8, C), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the third call")
            return self.linear(x.flatten(1))

    with pytest.raises(RuntimeError, match="the third call"):
        train("threads", [Fails(), Fails()], steps=4)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("peers", "threads", "chosen"),
    [
        (("resnet8", "resnet8"), 2, "threads"),
        (("resnet8", "wrn_10_1"), 2, "threads"),
        (("resnet8", "resnet8"), 1, "eager"),  # no core for each
        (("resnet8",) * 3, 2, "eager"),
        (("resnet8", nn.Sequential(nn.Flatten(), nn.Linear(3 * 72 * 72, C))), 2, "eager"),
    ],
    ids=str,
)
def test_auto_takes_threads_where_every_peer_has_a_core(capsys, peers, threads, chosen):
    """Not for peers of others, which may draw random numbers at some later step."""
    torch.set_num_threads(threads)
    cohort = Cohort(peers, C)
    optimizer = make_optimizer(cohort, "sgd", lr=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, amp="off")
    step(*next(batches(1, side=72)))
    assert step.name == chosen
    assert capsys.readouterr().err == f"execution: {chosen}\n"


def test_threads_are_for_a_cpu():
    assert "threads" in executions(torch.device("cpu"))
    assert "threads" not in executions(torch.device("cuda"))
