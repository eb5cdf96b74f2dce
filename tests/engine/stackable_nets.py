"""Small networks that may or may not be stacked, and how a refusal shows."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.stackable import Unstackable
from fastdml.loss import MutualLoss

C, SIDE = 5, 8


def batch(seed=0, n=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return images, torch.randint(C, (n,), generator=generator)


class Net(nn.Module):
    """Two convolutions with what `mix` makes of the map between them."""

    num_classes = C

    def __init__(self, mix=lambda net, x: x, **layers):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.mix, self.second = mix, nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, C)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = self.mix(x) if isinstance(self.mix, nn.Module) else self.mix(self, x)
        return self.head(self.drop(F.relu(self.second(x)).mean((2, 3))))


class Hidden(nn.Module):
    """A residual branch that mixes, behind a BatchNorm whose weights are zeros at the start."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return x + self.norm(self.conv(x).softmax(1))


def cohort_of(build, K=2):
    peers = []
    for k in range(K):
        torch.manual_seed(k)
        peers.append(build().double())
    return Cohort(peers, C).train()


def stacked(cohort, **options):
    optimizer = make_optimizer(cohort, lr=0.05, weight_decay=1e-3)
    options = {"execution": "stacked", "amp": "off", **options}
    return make_step(cohort, MutualLoss(), optimizer, **options)


def memory(cohort):
    """Address, strides and storage size of every tensor."""
    tensors = [*cohort.parameters(), *cohort.buffers()]
    return [(t.data_ptr(), t.stride(), t.untyped_storage().nbytes()) for t in tensors]


def saved_bytes(peer):
    file = io.BytesIO()
    torch.save(peer.state_dict(), file)
    return file.tell()


def assert_refused(cohort, message, make=stacked):
    """Asserts that making the step or its first call refuses the peers, in one line, and leaves
    them unchanged."""
    lies, values = memory(cohort), copy.deepcopy(cohort.state_dict())
    modes = [m.training for m in cohort.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(Unstackable, match=message) as caught:
        make(cohort)(*batch())
    assert "\n" not in str(caught.value)
    assert memory(cohort) == lies
    assert all(torch.equal(v, values[k]) for k, v in cohort.state_dict().items())
    assert all(w.grad is None for w in cohort.parameters())
    assert [m.training for m in cohort.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
