"""The optimizer over all peers, and the learning rates that it takes from the device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Schedule, learning_rates, make_optimizer
from fastdml.errors import InputError


@pytest.fixture
def cohort():
    return Cohort([nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))], 2)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_group_a_peer_and_one_learning_rate(cohort, name):
    optimizer = make_optimizer(cohort, name, lr=0.5, weight_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    Schedule(optimizer, torch.tensor([0.25]))
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is second
    assert first == 0.25
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_updates_equal_torchs_plain_ones(cohort, name):
    """Against the same optimizer, not fused, with a float for its learning rate."""
    twins = [nn.Parameter(w.detach().clone().double()) for w in cohort.parameters()]
    optimizer = make_optimizer(cohort, name, lr=0.125, momentum=0.5, weight_decay=0.25)
    if name == "sgd":
        plain = torch.optim.SGD(twins, 0.125, 0.5, weight_decay=0.25, nesterov=True)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        plain = kind(twins, 0.125, (0.5, 0.999), weight_decay=0.25)
    for _ in range(3):
        for w, v in zip(cohort.parameters(), twins, strict=True):
            w.grad = torch.randn_like(w)
            v.grad = w.grad.double()
        optimizer.step()
        plain.step()
    for w, v in zip(cohort.parameters(), twins, strict=True):
        torch.testing.assert_close(w.double(), v.detach(), rtol=1e-5, atol=1e-5)


def test_frozen_parameters_are_left_out(cohort):
    cohort.peers[1].requires_grad_(False)
    optimizer = make_optimizer(cohort, lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    cohort.requires_grad_(False)
    with pytest.raises(InputError, match="no peer has a parameter to train"):
        make_optimizer(cohort, lr=0.1)


def test_unknown_optimizer(cohort):
    with pytest.raises(InputError, match="sgd, adam, adamw, not 'lion'"):
        make_optimizer(cohort, "lion", lr=0.1)


def test_the_papers_schedule():
    rates = learning_rates(lr=0.1, epochs=200, steps=781)
    assert rates.shape == (200 * 781,)
    for epoch, lr in [(0, 0.1), (59, 0.1), (60, 0.01), (119, 0.01), (120, 1e-3), (180, 1e-4)]:
        at = rates[epoch * 781 : (epoch + 1) * 781]
        torch.testing.assert_close(at, torch.full((781,), lr))


@settings(deadline=None)
@given(
    epochs=st.integers(1, 30),
    steps=st.integers(1, 40),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["step", "cosine"]),
)
def test_rates_rise_in_the_warm_up_and_never_afterwards(epochs, steps, warmup, schedule):
    rates = learning_rates(
        lr=0.5,
        epochs=epochs,
        steps=steps,
        schedule=schedule,
        drop_every=7,
        warmup_epochs=warmup * epochs,
    )
    assert rates.shape == (epochs * steps,)
    assert ((rates > 0) | (schedule == "cosine")).all()
    assert (rates <= 0.5 + 1e-7).all()
    count = min(round(warmup * epochs * steps), epochs * steps)
    assert (rates[count:].diff() <= 1e-8).all()
    if count and schedule == "cosine":
        torch.testing.assert_close(rates[0].item(), 0.5 / count, rtol=1e-5, atol=0.0)
        assert (rates[:count].diff() > 0).all()
    if schedule == "cosine" and count < len(rates):
        half = rates[(count + len(rates)) // 2].item()
        place = ((count + len(rates)) // 2 - count) / (len(rates) - count)
        assert half == pytest.approx(0.25 * (1 + math.cos(math.pi * place)), abs=1e-6)


def test_the_schedule_moves_by_updates_and_ends_at_the_last_rate(cohort):
    optimizer = make_optimizer(cohort, lr=0.1)
    schedule = Schedule(optimizer, torch.tensor([4.0, 2.0, 1.0]))
    seen = []
    for skipped in (None, torch.tensor(1.0), torch.tensor(0.0), None, None):
        seen.append(optimizer.param_groups[0]["lr"].item())
        schedule.advance(skipped)
    assert seen == [4.0, 2.0, 2.0, 1.0, 1.0]
    assert schedule.updates == 4


def test_the_schedule_survives_the_optimizers_own_loading(cohort):
    """load_state_dict puts copies of the learning rate into the groups."""
    optimizer = make_optimizer(cohort, lr=0.1)
    schedule = Schedule(optimizer, torch.tensor([4.0, 2.0, 1.0]))
    saved = optimizer.state_dict()
    schedule.advance()
    updates = schedule.updates.clone()
    optimizer.load_state_dict(saved)
    schedule.load(updates)
    assert all(group["lr"] is schedule.lr for group in optimizer.param_groups)
    assert schedule.lr == 2.0
    schedule.advance()
    assert optimizer.param_groups[1]["lr"] == 1.0
