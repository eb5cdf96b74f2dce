"""The options of the loss as settings of a run: all values of each, and what reaches the loss."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from fastdml_kernels.options import CHOICES
from tiny_runs import make_cohort, make_loaders

from fastdml.engine import StepOutput, make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.train import ReidConfig, TrainConfig, fit
from fastdml.train.config.fields import field_types
from fastdml.train.tasks.task import task_of

pytestmark = pytest.mark.usefixtures("_no_pictures")
OPTIONS = ("target", "gate", "divergence")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_setting_has_the_values_that_the_loss_has(name):
    assert get_args(field_types(TrainConfig)[name]) == CHOICES[name]


@pytest.mark.parametrize("kind", [TrainConfig, ReidConfig])
def test_they_reach_the_loss_of_either_task(kind):
    for name in OPTIONS:
        for value in CHOICES[name]:
            config = kind(**{name: value})
            options = task_of(config).mutual_loss(config, 3).options
            assert getattr(options, name) == value
    config = kind(divergence="jsd", jsd_beta=0.25)
    options = task_of(config).mutual_loss(config, 3).options
    assert (options.divergence, options.jsd_beta) == ("jsd", 0.25)
    assert task_of(config).mutual_loss(kind(), 3).options == MutualLoss().options


def test_a_run_takes_the_steps_of_that_loss(settings):
    options = {"target": "ensemble", "gate": "entropy", "divergence": "jsd", "jsd_beta": 0.3}
    cohort = make_cohort(widths=(4, 7, 5))
    for peer in cohort.peers:
        peer.drop.p = 0.0
    config = settings(epochs=1, lr=0.125, momentum=0.0, nesterov=False, weight_decay=0.0, **options)
    plain = make_cohort(widths=(4, 7, 5))
    for peer in plain.peers:
        peer.drop.p = 0.0
    train, test = make_loaders()
    result = fit(cohort, train, test, config)
    optimizer = make_optimizer(plain, "sgd", lr=0.125, momentum=0.0)
    plain.to(memory_format=torch.channels_last)
    step = make_step(plain, MutualLoss(**options), optimizer, execution="eager", amp="off")
    outputs: list[StepOutput] = [step(*batch) for batch in train.epoch(0)]
    losses = torch.stack([output.losses for output in outputs]).double().mean(0)
    assert result.history[0]["loss"] == pytest.approx(losses.tolist(), rel=1e-6)
    for a, b in zip(cohort.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward, reverse, jeffreys, jsd"),
        ({"jsd_beta": 0.3}, "jsd_beta 0.3 has no effect with divergence forward"),
        ({"divergence": "jsd", "jsd_beta": 1.5}, r"jsd_beta must be within 0\.\.1, not 1.5"),
        ({"gate": "best", "labelled": 100}, "gate best goes by labels, so that nobody would teach"),
        ({"gate": "confidence", "unlabelled": "images"}, "gate confidence goes by labels"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)
    assert TrainConfig(gate="entropy", labelled=100).gate == "entropy"
