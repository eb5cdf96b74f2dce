"""Trained from the same seed, DML and DML_e end with the same weights: bit for bit in eager on a
CPU, to rounding in other executions."""

from __future__ import annotations

import pytest
import torch

from fastdml.cohort import Cohort
from fastdml.data.sets.digits import load_digits
from fastdml.engine import make_optimizer, make_step
from fastdml.loss import MutualLoss

STEPS, ROWS = 20, 32


@pytest.fixture(scope="module")
def digits():
    images, _ = load_digits()
    x = images.images.float() / 16
    return x, images.labels


def trained(digits, target, K, *, labelled=ROWS, steps=STEPS, loss=None, **options):
    """Weights and losses of a cohort after real steps on digits, from seed 0."""
    x, y = digits
    cohort = Cohort(["resnet8"] * K, 10, in_channels=1, seed=0)
    options = {"amp": "off", "execution": "eager", **options}
    mutual = MutualLoss(target=target, mimic_ignored=labelled < ROWS, **(loss or {}))
    step = make_step(cohort, mutual, make_optimizer(cohort, lr=0.1, weight_decay=5e-4), **options)
    losses = []
    for i in range(steps):
        rows = slice(i * ROWS, (i + 1) * ROWS)
        labels = y[rows].clone()
        labels[labelled:] = -100
        losses.append(step(x[rows], labels).losses.clone())
    return cohort.state_dict(), torch.stack(losses)


def assert_same_bits(digits, K, **options):
    (each, loss_of_each), (mean, loss_of_mean) = (
        trained(digits, target, K, **options) for target in ("peers", "ensemble")
    )
    assert each.keys() == mean.keys()
    for name, value in each.items():
        assert torch.equal(value, mean[name]), name
    if K > 2:  # the losses say that these were two different ones
        assert (loss_of_mean <= loss_of_each + 1e-6).all()
        assert not torch.equal(loss_of_mean, loss_of_each)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_same_weights_bit_for_bit(digits, K, amp):
    assert_same_bits(digits, K, amp=amp)


@pytest.mark.parametrize(
    "options",
    [
        {"update": "sequential"},
        {"labelled": 20},
        {"loss": {"temperature": 4.0, "label_smoothing": 0.1}, "grad_clip": 1.0},
        {"loss": {"gate": "confidence"}, "accumulate": 2},
    ],
    ids=["sequential", "semi-supervised", "tempered", "gated"],
)
def test_the_same_bits_whatever_else_is_asked_for(digits, options):
    assert_same_bits(digits, 3, **options, steps=8)


@pytest.mark.parametrize("execution", ["threads", "stacked"])
def test_the_same_weights_to_rounding_in_other_executions(digits, execution):
    each, _ = trained(digits, "peers", 3, steps=8)
    mean, _ = trained(digits, "ensemble", 3, steps=8, execution=execution)
    for name, value in each.items():
        torch.testing.assert_close(mean[name], value, rtol=1e-3, atol=1e-3, msg=name)
