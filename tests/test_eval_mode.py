"""Evaluation mode for a while: everything is in it, and each module is back in its own later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdml.eval_mode import evaluating


@pytest.fixture
def network():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    network[1][0].eval()  # frozen statistics beside layers that train
    return network


def modes(network):
    return [m.training for m in network.modules()]


def test_every_module_is_in_evaluation_mode_inside_and_in_its_own_afterwards(network):
    before = modes(network)
    assert before == [True, True, True, False, True]
    with evaluating(network):
        assert not any(modes(network))
    assert modes(network) == before


def test_an_error_and_changes_inside_leave_the_modes_as_they_were(network):
    before = modes(network)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluating(network):
        network.train()(torch.zeros(1, 3))
    assert modes(network) == before


def test_a_module_that_was_replaced_inside_is_left_alone(network):
    with evaluating(network):
        network[0] = nn.Linear(2, 2).eval()
    assert modes(network) == [True, False, True, False, True]
