"""What tests of runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from market_files import write_market

from fastdml.report import plots
from fastdml.train import TrainConfig


@pytest.fixture(scope="session")
def market_root(tmp_path_factory) -> Path:
    """Not to be changed."""
    return write_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(autouse=True)
def _own_scans(scans):
    """The scans of these files are not kept in the user's own cache."""


@pytest.fixture
def _no_pictures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(plots, "draw", lambda folder, headlines, formats: [])


@pytest.fixture
def settings(tmp_path):
    """Makes settings for a run of `tiny_runs` in the test's own folder."""

    def make(**changes) -> TrainConfig:
        values = {
            "folder": str(tmp_path / "run"),
            "batch_size": 16,
            "epochs": 3,
            "log_every": 4,
            "amp": "off",
            "device": "cpu",
            "execution": "eager",
            "threads": 1,
            "tensorboard": False,
        }
        return TrainConfig(**{**values, **changes})

    return make
