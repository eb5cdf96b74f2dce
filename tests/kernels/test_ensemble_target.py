"""The mean of the teachers' probabilities as the target (DML_e): cross-entropy is linear in its
target, so the gradient is that of the teachers one by one. On the CPU it has the same bits,
whatever else is asked for; only the loss is smaller, as the KL divergence is convex."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastdml_kernels import cpu_rows
from hypothesis import given, settings
from oracle import DTYPES, OPTIONS, Problem, cpu, make, problems

OTHERS = {
    name: values
    for name, values in OPTIONS.items()
    if name not in ("target", "divergence", "detach_targets")
}


def both(p: Problem):
    """The answers with each peer, and with their mean, as the target."""
    return [
        cpu(dataclasses.replace(p, options=dataclasses.replace(p.options, target=target)))
        for target in ("peers", "ensemble")
    ]


def assert_same_gradients(p: Problem) -> None:
    each, mean = both(p)
    for a, b in zip(each.grads, mean.grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@given(problems(most_logits=2_000, most_classes=530, options=OTHERS))
@settings(max_examples=25, deadline=None)
def test_gradients_have_the_same_bits(drawn):
    assert_same_gradients(drawn[0])


@pytest.mark.parametrize("options", [{}, {"peer_weights": True, "temperature": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_gradients_have_the_same_bits_in_torch(dtype, options, monkeypatch):
    monkeypatch.setattr(cpu_rows, "library", lambda: None)
    for K in (2, 3, 5, 17):
        assert_same_gradients(make(K, 20, 30, dtype=dtype, **options))


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"mimic_ignored": True}], ids=str)
def test_the_loss_is_smaller_from_three_peers_on(options):
    for K in (2, 3, 6):
        each, mean = both(make(K, 50, 20, ignored=0.2, **options))
        if K == 2:
            assert torch.allclose(mean.losses, each.losses, rtol=1e-6)
        else:
            assert (mean.losses < each.losses - 0.01).all()
        others = [name for name in each.stats if name != "kl"]
        torch.testing.assert_close(
            {name: mean.stats[name] for name in others},
            {name: each.stats[name] for name in others},
        )
