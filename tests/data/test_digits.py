from __future__ import annotations

import sys

import pytest
import torch

from fastdml.data import load, load_digits
from fastdml.errors import MissingExtra


def test_digits_are_split_by_class(digits):
    train, test = digits
    assert train.images.shape == (1442, 1, 8, 8)
    assert test.images.shape == (355, 1, 8, 8)
    assert train.pixels.is_contiguous()
    assert int(train.images.max()) == int(test.images.max()) == 16
    share = torch.bincount(test.labels) / torch.bincount(torch.cat([train.labels, test.labels]))
    assert ((share > 0.19) & (share <= 0.2)).all()
    rows = torch.cat([train.images, test.images]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # all there, none in both


def test_split_is_fixed(digits):
    for a, b in zip(digits, load("digits"), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_normalisation_is_that_of_the_training_images(digits):
    train, test = digits
    images = train.images.double()
    assert train.mean == test.mean == (round(float(images.mean()), 4),)
    assert train.std == test.std == (round(float(images.std(correction=0)), 4),)


def test_missing_scikit_learn_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'fastdml\[train\]'"):
        load_digits()
