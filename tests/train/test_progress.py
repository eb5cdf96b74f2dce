"""The lines that a user sees while a run trains: how wide they are, and what each peer costs."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fastdml.engine.amp import resolve_amp
from fastdml.metrics import ClassificationScores
from fastdml.train.peer_costs import peer_seconds
from fastdml.train.progress import Progress
from fastdml.units import milliseconds, rate

CPU = torch.device("cpu")


def finished_epoch(images: str, left: float, wait: float = 0.0) -> Progress:
    """Epoch 100 of 200 of two peers, with numbers as wide as they are in long runs."""
    progress = Progress(781, 200 * 781, images, position=100 * 781)
    values = {n: [0.9] * 2 for n in ("top5", "ece", "nll", "entropy")}
    ensembles = {f"ensemble_{n}": 0.9767 for n in ("top1", "top5", "ece", "nll", "entropy")}
    scores = ClassificationScores(
        rows=10_000, top1=[0.9767, 0.9651], nonfinite=[0, 0], **values, **ensembles
    )
    progress.history.append(
        {"epoch": 100, "step": 78100, "loss": [1.076, 0.07], "images_per_second": 98_765.4}
        | {"data_wait": wait}
    )
    progress.evaluated(scores)
    progress.first, progress.begun = 0, time.monotonic() - left
    return progress


@pytest.mark.parametrize("images", ["test", "validation"])
@pytest.mark.parametrize("label", ["mutual", "independent"])
@pytest.mark.parametrize("left", [500.0, 30_000.0, 40 * 86_400.0])
def test_the_line_of_an_epoch_of_two_peers_fits_100_columns(images, label, left):
    line = f"{label} {finished_epoch(images, left).epoch_line()}"
    assert len(line) <= 100, line
    assert line.endswith(" left")


def test_what_it_says():
    line = finished_epoch("validation", 600.0).epoch_line()
    assert line == (
        "epoch 100/200  loss 1.076 0.070  val top-1 97.67 96.51 ens 97.67  98.8k/s  10 min left"
    )
    assert "  98.8k/s  data wait 12 %  " in finished_epoch("test", 600.0, 0.12).epoch_line()


def test_rates():
    found = [rate(x) for x in (0.4, 104.2, 9999.4, 9999.6, 15_746.2, 1_234_567.0)]
    assert found == ["0", "104", "9,999", "10.0k", "15.7k", "1,234.6k"]


def test_milliseconds():
    found = [milliseconds(x) for x in (0.00123, 0.0335, 0.9994, 0.9996, 1.3204)]
    assert found == ["1.23", "33.5", "999", "1,000", "1,320"]


class Counts(nn.Module):
    """Costs `passes` passes through a layer; counts calls of any copy of it."""

    calls = 0

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes, self.linear, self.drop = passes, nn.Linear(256, 256), nn.Dropout()
        self.norm = nn.BatchNorm1d(256)

    def forward(self, x):
        Counts.calls += 1
        for _ in range(self.passes):
            x = self.drop(self.norm(self.linear(x)))
        return x


def test_costs_leave_no_trace_in_the_peers():
    peers = [Counts(1).eval(), Counts(40).eval()]
    before = [{k: v.clone() for k, v in peer.state_dict().items()} for peer in peers]
    drawn = torch.get_rng_state()
    found = peer_seconds(peers, torch.ones(64, 256), resolve_amp("off", CPU))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert len(found) == 2
    assert min(found) > 0
    assert 2 <= Counts.calls <= 16
    for peer, state in zip(peers, before, strict=True):
        assert not peer.training
        assert all(p.grad is None for p in peer.parameters())
        assert all(torch.equal(value, state[key]) for key, value in peer.state_dict().items())


def test_a_peer_that_cannot_be_copied_costs_nothing_that_is_known():
    class Locked(Counts):
        def __deepcopy__(self, memo):
            raise TypeError("no copy")

    amp = resolve_amp("off", CPU)
    assert peer_seconds([Counts(1), Locked(1)], torch.randn(4, 256), amp) is None


def test_a_frozen_peer_and_one_that_fails():
    amp = resolve_amp("off", CPU)
    frozen = Counts(1).requires_grad_(False)
    with torch.inference_mode():
        inputs = torch.ones(4, 256)  # autograd keeps none of these
    assert len(peer_seconds([Counts(1), frozen], inputs, amp)) == 2
    assert peer_seconds([Counts(1), Counts(2)], torch.ones(4, 7), amp) is None
