"""A disk that fills up while ranks write a checkpoint beside training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mesh_trainings import furthest, made, outcome, train
from ranks import run_ranks

from fastdml.errors import InputError
from fastdml.train import saving
from fastdml.train.checkpoint_folder import (
    CHECKPOINTS,
    check_files,
    checkpoint_folders,
    read_manifest,
    whole_folders,
)

SAVING = {"save_every_steps": 1, "tensorboard": False, "eval_every": 2}


@pytest.fixture
def disk(small_disk):
    """An empty file system of 2 MB."""
    return small_disk(2)


def fill(ballast: Path, left: int) -> None:
    """All of the disk but `left` bytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
    os.truncate(ballast, ballast.stat().st_size - left)


def filled(disk: Path, elsewhere: Path) -> dict[str, object]:
    """One rank finds no room for its part of the fourth checkpoint; what all ranks raise, what is
    left then, and how far the run ends from one that had room."""
    mesh, run = made(2, 1), disk / "run"
    train(elsewhere, mesh, **SAVING)
    written, saves = saving.FolderCheckpoints._written, []

    def fill_first(self: saving.FolderCheckpoints, *arguments: object) -> object:
        saves.append(arguments)
        if len(saves) == 4 and mesh.rank == 1:
            fill(disk / "ballast", 1 << 13)
        return written(self, *arguments)

    saving.FolderCheckpoints._written = fill_first
    try:
        with pytest.raises(InputError) as error:
            train(run, mesh, **SAVING)
    finally:
        saving.FolderCheckpoints._written = written
    mesh.gather(None)
    found = {"said": str(error.value), "whole": whole_folders(run), "all": checkpoint_folders(run)}
    for path in found["whole"]:
        check_files(path, read_manifest(path).files)
    mesh.gather(None)
    if mesh.lead:
        (disk / "ballast").unlink()
    mesh.gather(None)
    train(run, mesh, **SAVING)
    return found | {"gap": furthest(outcome(run), outcome(elsewhere))}


def test_a_full_disk_ends_the_run_in_a_line_and_loses_nothing(disk, tmp_path):
    first, second = run_ranks(2, filled, disk, tmp_path / "elsewhere")
    assert first["said"] == second["said"]
    checkpoints = disk / "run" / CHECKPOINTS
    assert first["said"].startswith(f"cannot write the checkpoint {checkpoints}/step-00000003/")
    assert first["said"].endswith(
        " (the one before it is kept): No space left on device: make room and resume"
    )
    assert [path.name for path in first["whole"]] == ["step-00000001", "step-00000002"]
    assert first["all"] == first["whole"]  # what was not complete is gone
    assert first["gap"] == 0
