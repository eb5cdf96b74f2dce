"""Real sets; random ones are in image_sets.py."""

from __future__ import annotations

import shutil
import warnings

import pytest

from fastdml.data import Market1501, load_digits
from fastdml.data.sets.stand_in import StandIn, build_standin

SMALL = StandIn(train_ids=8, test_ids=5, images=16, junk=7, distractors=11, odd_every=4)


@pytest.fixture
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")
    return load_digits()


@pytest.fixture(scope="session")
def standin(cifar100_root, tmp_path_factory):
    """A small stand-in for Market-1501 from real CIFAR-100; not to be changed."""
    return build_standin(tmp_path_factory.mktemp("market"), cifar100_root, SMALL)


@pytest.fixture
def market(standin, scans):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a subset
        return Market1501(standin)


@pytest.fixture
def standin_copy(standin, scans, tmp_path):
    """One to spoil; returns the folder of the splits."""
    shutil.copytree(standin, tmp_path / "copy")
    return tmp_path / "copy" / "Market-1501-v15.09.15"


@pytest.fixture
def split(standin_copy):
    """Its images for training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a subset
        return Market1501(standin_copy).train
