"""Runs that are stopped and go on: bit for bit on the mesh that they ran on, to rounding on another
and without one, forth and back; never from a checkpoint that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mesh_trainings import (
    STEPS,
    copy,
    flip,
    furthest,
    heard,
    made,
    outcome,
    peers,
    train,
    without_statistics,
)
from ranks import run_ranks

from fastdml import Cohort
from fastdml.errors import InputError
from fastdml.parallel import Mesh
from fastdml.train import checkpoint
from fastdml.train.checkpoint_folder import CHECKPOINTS, MANIFEST, read_manifest, whole_folders
from fastdml.train.checkpoint_reading import checkpoints, read_newest
from fastdml.train.run_weights import load_cohort

ROUNDING = 1e-12  # of float64, over 12 steps
STOP = 2  # the step after which a signal comes, which is heeded two steps later
DROP = {"drop": 0.2, "optimizer": "adam", "lr": 0.01}


def folders(run: Path) -> list[str]:
    return [path.name for path in whole_folders(run)]


def on_one(root: Path) -> None:
    """Begins runs of one process, with a mesh and without. Dropout draws by peer and step on a mesh
    alone."""
    assert train(root / "one", made(1, 1), stop_after=STOP, accumulate=4, **DROP) is None
    train(root / "whole plain", None, accumulate=4)
    assert train(root / "plain", None, accumulate=4, stop_after=STOP) is None


def on_four(root: Path) -> dict[str, object]:
    mesh, said = made(2, 2), {}
    begun = {"accumulate": 2, **DROP}
    train(root / "whole", mesh, **begun)
    said["kept"] = folders(root / "whole")
    stop = {"stop_after": STOP if mesh.rank == 3 else None}  # a signal to one rank
    assert train(root / "stopped", mesh, **stop, **begun) is None
    said["stopped"] = folders(root / "stopped")
    for name in ("same", "flipped", "to two", "to one"):
        copy(root / "stopped", root / name, mesh)
    train(root / "same", mesh, **begun)
    said["flipped"] = _damaged(root / "flipped", mesh, begun)
    copy(root / "plain", root / "plain to four", mesh)
    train(root / "plain to four", mesh, stop_after=STOP + 2)
    return said


def more_on_four(root: Path) -> None:
    mesh = made(1, 4)
    train(copy(root / "stopped", root / "columns", mesh), mesh, **DROP)
    mesh = made(2, 2)
    train(copy(root / "one", root / "one to four", mesh), mesh, **DROP)


def _damaged(run: Path, mesh: Mesh, begun: dict) -> list[str]:
    """One file of the newest checkpoint loses a bit, which one rank alone will read."""
    if mesh.lead:
        (file,) = whole_folders(run)[-1].glob("peer-03-*")
        flip(file, 8 * (file.stat().st_size // 2))
        killed = run / CHECKPOINTS / "step-00000005"
        killed.mkdir()
        (killed / ".run.ckpt.partial").write_bytes(b"half")
    mesh.gather(None)
    with heard() as lines:
        train(run, mesh, **begun)
    return lines


def on_two(root: Path) -> str:
    mesh = made(2, 1)
    train(root / "to two", mesh, **DROP)
    copies = {"exchange": "weights", "exchange_every": 5, "save_every_steps": 3, **DROP}
    train(root / "copies", mesh, **copies)
    stop = {"stop_after": STOP + 4 if mesh.lead else None}  # saved between two exchanges
    assert train(root / "stopped copies", mesh, **stop, **copies) is None
    train(root / "stopped copies", mesh, **copies)
    mesh = made(1, 2)
    copy(root / "one", root / "cannot", mesh)
    for path in (root / "cannot").glob(f"{CHECKPOINTS}/*/{MANIFEST}") if mesh.lead else ():
        path.unlink()
    mesh.gather(None)
    with pytest.raises(InputError) as error:
        train(root / "cannot", mesh, **DROP)
    return str(error.value)


def back_on_one(root: Path) -> None:
    train(root / "to one", made(1, 1), **DROP)
    train(root / "plain to four", None, accumulate=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, what four ranks said, and what two were told."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, on_one, root)
    said = run_ranks(4, on_four, root)
    told = run_ranks(2, on_two, root)
    run_ranks(1, back_on_one, root)
    return root, said[0], told


def test_the_same_mesh_goes_on_bit_for_bit(runs):
    root, said, _ = runs
    assert said["stopped"] == ["step-00000000", "step-00000004"]
    assert said["kept"] == ["step-00000006", "step-00000012"]
    assert furthest(outcome(root / "same"), outcome(root / "whole")) == 0
    weights = [*(root / "whole").rglob("*.safetensors")]
    assert len(weights) == 8
    for path in weights:
        other = root / "same" / path.relative_to(root / "whole")
        assert other.read_bytes() == path.read_bytes()


def test_copies_of_peers_elsewhere_go_on_bit_for_bit(runs):
    root, _, _ = runs
    assert furthest(outcome(root / "stopped copies"), outcome(root / "copies")) == 0


@pytest.fixture(scope="module")
def more(runs):
    run_ranks(4, more_on_four, runs[0])


def check_goes_on(root, name):
    found, wanted = (without_statistics(outcome(root / run)) for run in (name, "whole"))
    assert found["position"] == 2 * STEPS
    assert furthest(found, wanted) < ROUNDING


@pytest.mark.parametrize("name", ["to two", "to one"])
def test_another_mesh_goes_on_to_rounding(runs, name):
    check_goes_on(runs[0], name)


@pytest.mark.slow
@pytest.mark.usefixtures("more")
@pytest.mark.parametrize("name", ["columns", "one to four"])
def test_more_of_other_meshes(runs, name):
    check_goes_on(runs[0], name)


def test_a_run_without_a_mesh_goes_on_on_one_and_back(runs):
    """It was stopped after 2 steps on one process and after 6 on four; the newest counts."""
    root, _, _ = runs
    run = root / "plain to four"
    found = [path.name for path in checkpoints(run)]
    assert found == ["step-00000012", "step-00000006", "last.ckpt"]
    found, wanted = (without_statistics(outcome(path)) for path in (run, root / "whole plain"))
    assert furthest(found, wanted) < ROUNDING


def test_a_damaged_checkpoint_is_passed_over_and_said(runs):
    root, said, _ = runs
    (line,) = said["flipped"]
    run = root / "flipped"
    newest = run / CHECKPOINTS / "step-00000004"
    assert line.startswith(f"{newest / 'peer-03-Sequential-4.ckpt'} is damaged: its SHA-256")
    assert line.endswith(f"going on from the checkpoint before, {newest.parent}/step-00000000")
    assert (newest.with_name("step-00000004.damaged") / MANIFEST).is_file()
    assert not (newest.parent / "step-00000005").exists()
    assert furthest(outcome(run), outcome(root / "whole")) == 0


def test_without_any_whole_checkpoint_nothing_begins_anew(runs):
    root, _, told = runs
    assert len({*told}) == 1
    assert told[0].startswith(f"cannot resume {root / 'cannot'}: checkpoints holds no whole")
    assert "metrics.jsonl" in told[0]


def test_of_no_mesh_that_cannot_show_the_parts(runs, tmp_path):
    root, _, _ = runs
    run = copy(root / "one", tmp_path / "run")
    for path in whole_folders(run):
        found = read_manifest(path)
        assert (found.accumulate, found.data, len(found.files)) == (4, 1, 6)
    from mesh_trainings import settings

    from fastdml.train.saving import accumulate_on

    class Three:
        data = 3

    with pytest.raises(InputError, match=r"a batch of this run has 4 parts \(accumulate=4"):
        accumulate_on(run, settings(run), Three())
    assert accumulate_on(run, settings(run), None).accumulate == 4
    assert accumulate_on(run, settings(run, sync_batchnorm=True), None).accumulate == 4
    with pytest.raises(InputError, match="with sync_batchnorm and accumulate=4"):
        accumulate_on(run, settings(run, sync_batchnorm=True), Three())


def test_the_peers_of_a_run_that_has_not_ended(runs):
    """Read without a mesh, with the mean of the columns' running statistics."""
    root, _, _ = runs
    found, weights = load_cohort(root / "stopped", None, "cpu", peers=list(peers(0.2)))
    assert weights == "last"
    state = read_newest(root / "stopped").state
    assert torch.equal(found[2][0].weight, state["ema"]["peers.2.0.weight"])
    own = [
        checkpoint.load(root / "stopped" / CHECKPOINTS / "step-00000004" / f"rank-0{rank}.ckpt")
        for rank in (2, 3)  # of peers 2 and 3
    ]
    name = "peers.2.1.running_mean"
    both = torch.stack([rank["ema"][name] for rank in own])
    assert not torch.equal(both[0], both[1])
    assert torch.allclose(found[2][1].running_mean, both.mean(0), rtol=1e-14)


def test_the_best_and_the_last_weights_of_all_ranks(runs):
    root, _, _ = runs
    for folder in (root / "whole", root / "whole" / "best"):
        Cohort.load(folder, peers=list(peers(0.2)))  # compares the files' SHA-256
        assert not [*folder.glob("**/.*.partial")]


def test_a_checkpoint_of_the_run_tells_its_data(runs):
    from fastdml.train.same_data import marks_of

    root, _, _ = runs
    plain, mesh = marks_of(root / "whole plain"), marks_of(root / "whole")
    assert plain is not None
    assert plain == mesh
