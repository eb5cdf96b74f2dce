"""Batch normalisation over columns on CUDA: three ranks that share a device over gloo."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_group_batch_norm import CUT, LAYERS, check, layer_of, passes
from torch import nn

from fastdml import Cohort
from fastdml.parallel import make_mesh, processes, sync_batchnorm

pytestmark = pytest.mark.gpu


def on_a_mesh() -> dict[str, Any]:
    processes.own_device = lambda device=None: torch.device("cuda", 0)
    processes.backend_of = lambda device: "gloo"
    mesh = make_mesh(1, 3, timeout=30)
    mesh.place(1)
    found = {}
    for case in LAYERS:
        layer = layer_of(case).cuda()
        sync_batchnorm(Cohort([nn.Sequential(nn.Linear(4, 2), layer)], 2), mesh)
        found[case] = passes(case, layer, slice(CUT[mesh.column], CUT[mesh.column + 1]))
    return found


@cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(3, on_a_mesh, timeout=120)


@pytest.mark.parametrize("case", LAYERS)
def test_it_is_one_process_with_the_whole_batch(case):
    check(case, [rank[case] for rank in ranks()])
