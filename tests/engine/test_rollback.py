"""State kept and put back; averages that follow the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Ema, make_optimizer
from fastdml.engine.rollback import Snapshot, optimizer_tensors
from fastdml.errors import InputError

CPU = torch.device("cpu")


def cohort_of(K=2):
    torch.manual_seed(0)
    return Cohort([nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(K)], 4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_everything_comes_back_bit_for_bit_in_place(name):
    cohort = cohort_of()
    optimizer = make_optimizer(cohort, name, lr=0.1)

    def tensors():
        return [*cohort.parameters(), *cohort.buffers(), *optimizer_tensors(optimizer)]

    def work():
        for peer in cohort.peers:
            peer(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # without state at first, then with
        held = [(t, t.clone()) for t in tensors()]
        snapshot = Snapshot(tensors, CPU)
        expected = torch.get_rng_state()
        work()
        assert not torch.equal(torch.get_rng_state(), expected)
        snapshot.restore()
        assert torch.equal(torch.get_rng_state(), expected)
        for t, value in held:
            assert torch.equal(t, value)
        known = {id(t) for t, _ in held}
        assert all((t == 0).all() for t in tensors() if id(t) not in known)
        work()


def test_a_first_step_after_the_restoration_is_a_first_step():
    """Zero moments and a zero step count are how Adam starts."""
    results = []
    for restored in (False, True):
        cohort = cohort_of()
        optimizer = make_optimizer(cohort, "adam", lr=0.1)
        generator = torch.Generator().manual_seed(0)
        for attempt in range(1 + restored):
            snapshot = Snapshot(
                lambda c=cohort, o=optimizer: [
                    *c.parameters(),
                    *c.buffers(),
                    *optimizer_tensors(o),
                ],
                CPU,
            )
            state = generator.get_state()
            for _ in range(3):
                for peer in cohort.peers:
                    peer(torch.randn(8, 3, generator=generator)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            if restored and attempt == 0:
                snapshot.restore()
                generator.set_state(state)
        results.append(copy.deepcopy(cohort.state_dict()))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_restoring_where_a_flag_is_set(flag):
    kept, extra, listed = torch.arange(3.0), torch.full((2,), torch.nan), []
    listed.append(kept)
    snapshot = Snapshot(lambda: listed, CPU)
    kept.fill_(torch.inf)
    listed.append(extra)
    snapshot.restore_where(torch.tensor(flag))
    if flag:
        assert torch.equal(kept, torch.arange(3.0))
        assert torch.equal(extra, torch.zeros(2))
    else:
        assert kept.isinf().all()
        assert extra.isnan().all()


@settings(deadline=None, max_examples=20)
@given(decay=st.floats(0.01, 0.999), steps=st.integers(1, 6))
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(decay, steps):
    cohort = cohort_of(1)
    weight = cohort.peers[0][0].weight
    ema = Ema(cohort, decay)
    expected = weight.detach().clone()
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        ema.update()
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(ema.state_dict()["peers.0.0.weight"], expected)


def test_averages_are_applied_for_a_while():
    cohort = cohort_of()
    ema = Ema(cohort, 0.5)
    start = copy.deepcopy(cohort.state_dict())
    with torch.no_grad():
        for t in [*cohort.parameters(), *cohort.buffers()]:
            t.add_(1)
    ema.update()
    own = copy.deepcopy(cohort.state_dict())

    def evaluate():
        with ema.applied():
            for key, value in cohort.state_dict().items():
                if value.is_floating_point():
                    torch.testing.assert_close(value, (start[key] + own[key]) / 2)
                else:  # BatchNorm's count of batches is the cohort's own
                    assert torch.equal(value, own[key])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert all(torch.equal(v, own[k]) for k, v in cohort.state_dict().items())
    fresh = Ema(cohort, 0.5)
    fresh.load_state_dict(ema.state_dict())
    fresh.copy_to_cohort()
    assert torch.equal(cohort.peers[0][0].weight, ema.state_dict()["peers.0.0.weight"])


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_decays_that_are_none(decay):
    with pytest.raises(InputError, match=r"within 0\.\.1"):
        Ema(cohort_of(), decay)
