"""A re-identification run on two rows that is stopped goes on bit for bit, the centres too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from mesh_trainings import furthest, logged
from ranks import run_ranks
from whole_runs import of_people

from fastdml.train.checkpoint_reading import read_newest
from fastdml.train.meters import Totals
from fastdml.train.stopping import TrainingStopped

MESH = "peer=2,data=1"


def people(root: Path, market: Path) -> None:
    of_people(MESH, root / "whole", market)
    counted = Totals.count

    def count(totals: Totals, step: int) -> None:
        counted(totals, step)
        if step == 1 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    Totals.count = count
    with pytest.raises(TrainingStopped):
        of_people(MESH, root / "stopped", market)
    Totals.count = counted
    dist.barrier()
    of_people(MESH, root / "stopped", market, resume=True)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(market_root, tmp_path):
    run_ranks(2, people, tmp_path, market_root, timeout=200)
    whole, stopped = (read_newest(tmp_path / name).state for name in ("whole", "stopped"))
    centers = whole["metric"]
    assert [*centers] == ["centers.0.centers", "centers.1.centers"]
    assert all(t.abs().sum() > 0 for t in centers.values())
    for part in ("cohort", "metric", "scores", "updates"):
        assert furthest(stopped[part], whole[part]) == 0
    assert furthest(logged(tmp_path / "stopped"), logged(tmp_path / "whole")) == 0
