"""Settings of every test.

Tests marked `gpu` are skipped, and say so, where there is no CUDA device. There, kernels run under
Triton's interpreter, in the same process and by the same tests as on a GPU; `tests/kernels` is on
the path for its helper `oracle`. Threads that wait for each other sleep: spinning makes small
networks up to ten times slower where cores are shared.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which torch is not
sys.path.append(str(Path(__file__).parent / "kernels"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
