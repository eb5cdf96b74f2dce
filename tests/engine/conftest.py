from __future__ import annotations

import pytest
import torch


@pytest.fixture
def _deterministic(monkeypatch):
    """The same algorithms wherever they run, and rounding far below the tolerances."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
