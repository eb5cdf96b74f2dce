"""Entropy and sorted probabilities, against predictions that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastdml.analysis import posterior
from fastdml.errors import InputError


class Mixture(nn.Module):
    """Says (1 - share) of one class, which the input names, plus share / C of each."""

    def __init__(self, share, classes):
        super().__init__()
        self.share, self.classes = share, classes

    def probabilities(self, x):
        sure = nn.functional.one_hot(x[:, 0].long(), self.classes).double()
        return (1 - self.share) * sure + self.share / self.classes

    def forward(self, x):
        return self.probabilities(x).log()


def test_a_known_mixture():
    C, share = 5, 0.4
    x = torch.tensor([[0], [3], [3], [4.0]])
    data = [(x[:3], torch.zeros(3).long()), (x[3:], torch.tensor([1]))]  # of two sizes
    found = posterior([Mixture(share, C), Mixture(1.0, C)], data, ranks=20)
    top, rest = 1 - share + share / C, share / C
    entropy = -(top * math.log(top) + (C - 1) * rest * math.log(rest))
    both = 0.5 * top + 0.5 / C, 0.5 * rest + 0.5 / C
    mixed = -(both[0] * math.log(both[0]) + (C - 1) * both[1] * math.log(both[1]))
    np.testing.assert_allclose(found.entropy, [entropy, math.log(C), mixed], rtol=1e-12)
    np.testing.assert_allclose(found.ranked[0], [top] + [rest] * (C - 1), rtol=1e-12)
    np.testing.assert_allclose(found.ranked.sum(1), 1, rtol=1e-12)  # all classes are there
    np.testing.assert_allclose(found.top1, [top, 1 / C, both[0]], rtol=1e-12)
    assert found.peers == ("Mixture-1", "Mixture-2", "ensemble")
    assert found.images == 4
    plain = found.to_dict()
    assert plain["top1"] == found.top1.tolist()
    assert plain["images"] == 4


def test_certainty_has_no_entropy_and_ranks_are_cut():
    found = posterior(Mixture(0.0, 3), [(torch.tensor([[1.0]]), torch.tensor([1]))], ranks=2)
    assert found.entropy.tolist() == [0, 0]
    assert found.ranked.tolist() == [[1, 0], [1, 0]]


def test_outputs_of_transformers_and_what_is_refused():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(Mixture):
        def forward(self, x):
            return Output(super().forward(x))

    data = [(torch.tensor([[1.0], [0.0]]), torch.tensor([1, 0]))]
    plain, wrapped = (posterior(kind(0.3, 3), data) for kind in (Mixture, Wrapped))
    np.testing.assert_array_equal(plain.ranked, wrapped.ranked)
    with pytest.raises(InputError, match="same classes"):
        posterior([Mixture(0.3, 3), Mixture(0.3, 4)], data)
    with pytest.raises(InputError, match="not logits"):
        posterior(nn.Flatten(0), data)
    with pytest.raises(InputError, match="ranks"):
        posterior(Mixture(0.3, 3), data, ranks=0)
    with pytest.raises(InputError, match="no network"):
        posterior([print], data)
