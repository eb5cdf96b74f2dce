"""Settings of every test.

Tests marked `gpu` are skipped, and say so, where there is no CUDA device. Threads that wait for
each other sleep: spinning makes small networks up to ten times slower where cores are shared.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
