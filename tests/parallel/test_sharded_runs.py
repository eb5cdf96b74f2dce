"""Whole runs of sharded peers: the same as those of whole ones, and resumed on other meshes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from reid_runs import SMALL
from sharded_nets import C, Net
from torch.distributed.fsdp import fully_shard

from fastdml import Cohort
from fastdml.errors import InputError
from fastdml.parallel import make_mesh
from fastdml.train import TrainConfig, fit, market1501

ROWS, BATCH = 48, 16
SHARDED = {"fsdp": True, "accumulate": 2}


def cohort() -> Cohort:
    torch.manual_seed(4)
    return Cohort([Net(5, True), Net(7, True)], C)


def arrays(seed: int, rows: int = ROWS) -> tuple:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (rows,), generator=g)
    images = torch.randn(rows, 3, 6, 6, generator=g)
    images[torch.arange(rows), labels % 3, labels % 6] += 2.0
    return images, labels


def config(folder: Path, **changes) -> TrainConfig:
    settings = {
        "batch_size": BATCH, "epochs": 2, "lr": 0.05, "amp": "off", "ema": 0.9, "seed": 3,
        "folder": str(folder), "tensorboard": False, "threads": 1, "execution": "eager",
        "figures": (),
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def trained(folder: Path, sizes=None, *, own: bool = False, **changes) -> dict:
    """own: the caller has sharded the peers."""
    torch.set_num_threads(1)
    made = cohort()
    mesh = None if sizes is None else make_mesh(*sizes)
    if own:
        for peer in made:
            fully_shard(peer, mesh=mesh.device_mesh["data"])
    result = fit(
        made, arrays(1), arrays(2, 37), config(folder, **changes), mesh=mesh,
        validation=arrays(3, 21),
    )  # fmt: skip
    return {
        "scores": json.dumps([str(result.scores), str(result.best_scores)]),
        "history": [record["loss"] for record in result.history],
        "weights": saved(folder),
        "best": saved(folder / "best"),
        "parameters": result.parameters,
    }


def saved(folder: Path) -> dict:
    peers = [Net(5, True), Net(7, True)]
    return Cohort.load(folder, peers=peers).state_dict()


def close(ours: dict, theirs: dict) -> None:
    """Weights; running statistics depend on which parts of a batch a process sees."""
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(t, theirs[name], rtol=2e-5, atol=2e-6, msg=name)


def on_two(tmp: Path) -> dict:
    found = {"sharded": trained(tmp / "sharded", (1, 2), **SHARDED)}
    with pytest.raises(InputError, match=r"independent starts a second time.* fsdp=True"):
        trained(tmp / "refused", (1, 2), own=True, independent=True)
    trained(tmp / "half", (1, 2), epochs=1, **SHARDED)
    if torch.distributed.get_rank() == 0:
        for name in ("same", "one", "square", "wide", "unsharded"):
            shutil.copytree(tmp / "half", tmp / name)
    torch.distributed.barrier()
    return {**found, "same": trained(tmp / "same", (1, 2), resume=True, **SHARDED)}


def on_four(tmp: Path) -> dict:
    return {
        "square": trained(tmp / "square", (2, 2), resume=True, **SHARDED),
        "wide": trained(tmp / "wide", (1, 4), resume=True, **SHARDED),
        "unsharded": trained(tmp / "unsharded", (2, 2), resume=True, accumulate=2),
        "begun by one": trained(tmp / "begun by one", (2, 2), resume=True, **SHARDED),
        "independent": trained(tmp / "independent", (2, 2), independent=True, **SHARDED),
        "own": trained(tmp / "own", (2, 2), own=True, accumulate=2),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("runs")
    return tmp, run_ranks(2, on_two, tmp, timeout=100)


def check(ours: dict, theirs: dict) -> None:
    for what in ("weights", "best"):
        close(ours[what], theirs[what])
    torch.testing.assert_close(ours["history"], theirs["history"], rtol=1e-5, atol=1e-5)
    assert ours["parameters"] == theirs["parameters"]


def test_a_run_goes_on_bit_for_bit_where_it_was_sharded(runs):
    for found in runs[1]:
        assert found["same"]["history"] == found["sharded"]["history"]
        for name, t in found["same"]["weights"].items():
            assert torch.equal(t, found["sharded"]["weights"][name]), name


def test_a_sharded_run_is_one_process_and_goes_on_in_one(runs):
    folder, ranks = runs
    check(trained(folder / "all", accumulate=4), ranks[0]["sharded"])
    check(trained(folder / "one", resume=True, accumulate=2), ranks[0]["sharded"])


def test_shards_that_were_changed_are_not_read(runs):
    """Neither their values nor their index, which is a pickle."""
    folder, _ = runs
    for name in (".metadata", "__1_0.distcp"):
        run = folder / f"changed{name}"
        shutil.copytree(folder / "half", run)
        for path in (run / "checkpoints").rglob(name):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{name} is damaged: its SHA-256"):
            trained(run, resume=True, accumulate=2)


@pytest.mark.slow
def test_a_sharded_run_goes_on_on_other_meshes(runs):
    folder, ranks = runs
    trained(folder / "begun by one", epochs=1, accumulate=4)
    expected = ranks[0]["sharded"]
    for found in run_ranks(4, on_four, folder, timeout=200):
        for name in ("square", "wide", "unsharded", "begun by one", "independent", "own"):
            check(found[name], expected)
    alone = folder / "independent" / "independent"
    assert saved(alone).keys() == expected["weights"].keys()


def reid(root: Path, tmp: Path) -> list[dict]:
    settings = {
        **SMALL,
        "mesh": "peer=1,data=2",
        "triplet_weight": 1.0,
        "sync_batchnorm": True,
        "figures": (),
    }
    found = []
    for fsdp in (False, True):
        result = market1501(root=str(root), folder=str(tmp / f"fsdp {fsdp}"), fsdp=fsdp, **settings)
        found.append({"scores": str(result.scores), "loss": result.history[-1]["loss"]})
    return found


@pytest.mark.slow
def test_a_reidentification_run_of_sharded_peers(market_root, tmp_path):
    for whole, sharded in run_ranks(2, reid, market_root, tmp_path, timeout=200):
        assert sharded["scores"] == whole["scores"]
        torch.testing.assert_close(sharded["loss"], whole["loss"], rtol=1e-5, atol=1e-5)
