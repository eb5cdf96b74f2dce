"""Small sets, and one made of real CIFAR-100."""

from __future__ import annotations

import os
import shutil
import warnings

import pytest
import torch

from fastdml.data import ImageSet, Market1501, load_digits
from fastdml.data.standin import StandIn, build_standin

SMALL = StandIn(train_ids=8, test_ids=5, images=16, junk=7, distractors=11, odd_every=4)


@pytest.fixture
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")
    return load_digits()


@pytest.fixture
def make_set():
    """Builds an `ImageSet` of random bytes."""

    def make(n=50, ch=3, height=8, width=8, classes=10, seed=0) -> ImageSet:
        random = torch.Generator().manual_seed(seed)
        return ImageSet(
            torch.randint(0, 256, (n, ch, height, width), dtype=torch.uint8, generator=random),
            torch.randint(0, classes, (n,), generator=random),
            classes,
            tuple(f"class {c}" for c in range(classes)),
            tuple(100.0 + 10 * c for c in range(ch)),
            tuple(50.0 + 5 * c for c in range(ch)),
        )

    return make


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """The folder of scan caches, so that the user's own is left alone."""
    folder = tmp_path_factory.mktemp("scans")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder / "fastdml" / "scans"
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


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
