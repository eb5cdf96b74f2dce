"""Features that several tests of re-identification score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdml.metrics import normalize_features


@pytest.fixture
def people():
    """Features of queries (120, 24) and gallery (480, 24) of 40 people before 4 cameras, so noisy
    that neighbours help, and the identities and cameras of both as `reid_scores` takes them."""
    rng = np.random.default_rng(1)
    ids = torch.arange(40).repeat_interleave(12)
    cameras = torch.arange(12).repeat(40) % 4
    x = rng.standard_normal((40, 24))[ids] + 1.4 * rng.standard_normal((480, 24))
    x = normalize_features(torch.from_numpy(x))
    asked = cameras == 0
    return x[asked], x, (ids[asked], ids, cameras[asked], cameras)
