from __future__ import annotations

import pytest
import torch

from fastdml.cohort import Cohort


@pytest.fixture
def trained() -> Cohort:
    cohort = Cohort(["resnet8", "wrn_10_1", "resnet8"], 5, in_channels=1, seed=1)
    cohort(torch.randn(4, 1, 8, 8))  # BatchNorm statistics are part of what is saved
    return cohort
