"""What tests of several ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from market_files import write_market


@pytest.fixture(scope="session")
def market_root(tmp_path_factory) -> Path:
    """Not to be changed."""
    return write_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(autouse=True)
def _own_scans(scans):
    """The scans of these files are not kept in the user's own cache."""


@pytest.fixture(autouse=True, scope="module")
def _own_threads():
    """Runs that ranks are compared with take one thread: in this module alone."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
