"""A checkpoint's folder: whole or not, damaged or not, the last few kept."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from fastdml.errors import InputError
from fastdml.train import checkpoint, checkpoint_reading
from fastdml.train import checkpoint_folder as folders
from fastdml.train.checkpoint_folder import MANIFEST, Manifest, Mark


def write(run, step, save=1):
    """A checkpoint with a file and a folder of two."""
    folder = run / folders.CHECKPOINTS / folders.folder_name(step, save)
    (folder / "peer-01-b").mkdir(parents=True)
    files = {"run.ckpt": checkpoint.save_marked(folder / "run.ckpt", {"w": torch.arange(99.0)})}
    for name in ("0.distcp", ".metadata"):
        (folder / "peer-01-b" / name).write_bytes(name.encode() * 9)
    files |= folders.marks_below(folder, "peer-01-b")
    folders.write_manifest(Manifest(folder, step, 2, 1, 3, files))
    return folder


def names(paths):
    return [path.name for path in paths]


def test_the_manifest_says_what_was_written(tmp_path):
    folder = write(tmp_path, 12)
    found = folders.read_manifest(folder)
    assert (found.step, found.peer, found.data, found.accumulate) == (12, 2, 1, 3)
    shards = {"peer-01-b/.metadata", "peer-01-b/0.distcp"}
    assert found.files.keys() == shards | {"run.ckpt"}
    assert found.below("peer-01-b").keys() == shards
    assert found.below("run.ckpt").keys() == {"run.ckpt"}
    folders.check_files(folder, found.files)
    loaded = checkpoint.load(folder / "run.ckpt", found.files["run.ckpt"])
    assert torch.equal(loaded["w"], torch.arange(99.0))


def test_every_flipped_bit_is_found(tmp_path):
    """In each file, the manifest too, at a hundred places of it and in its last byte."""
    folder = write(tmp_path, 12)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        good = path.read_bytes()
        for at in {*range(0, len(good), max(len(good) // 100, 1)), len(good) - 1}:
            bad = bytearray(good)
            bad[at] ^= 1 << (at % 8)
            path.write_bytes(bad)
            if path.name == MANIFEST and json.loads(good) == _parsed(bad):
                continue  # between tokens: white space for another
            with pytest.raises(InputError):
                folders.check_files(folder, folders.read_manifest(folder).files)
        path.write_bytes(good)
    folders.check_files(folder, folders.read_manifest(folder).files)


def _parsed(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / MANIFEST).unlink(), "is no whole checkpoint: it has no manifest.json"),
        (lambda f: os.truncate(f / MANIFEST, 40), "manifest.json is damaged: it is not JSON"),
        (lambda f: os.truncate(f / MANIFEST, 0), "manifest.json is damaged: it is not JSON"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json is damaged: its checksum"),
        (lambda f: (f / "run.ckpt").unlink(), "run.ckpt is missing"),
        (lambda f: os.truncate(f / "run.ckpt", 100), "run.ckpt is damaged: it has 100 bytes, not"),
        (lambda f: (f / "peer-01-b" / ".metadata").unlink(), "peer-01-b/.metadata is missing"),
    ],
)
def test_what_is_missing_or_cut_short_is_named(tmp_path, damage, said):
    folder = write(tmp_path, 12)
    damage(folder)
    with pytest.raises(InputError) as error:
        folders.read_manifest(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_manifest_of_another_folder_or_version_is_refused(tmp_path):
    folder = write(tmp_path, 12)
    moved = folder.rename(folder.with_name("step-00000013"))
    with pytest.raises(InputError, match="is of step 12, not of step-00000013"):
        folders.read_manifest(moved)
    content = json.loads((moved / MANIFEST).read_text())
    (moved / MANIFEST).write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(InputError, match="has format 2; this version of fastdml reads 1"):
        folders.read_manifest(moved)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out"])
def test_a_manifest_names_no_file_outside(tmp_path, name):
    folder = write(tmp_path, 12)
    found = folders.read_manifest(folder)
    found.files[name] = Mark("0" * 64, 1)
    folders.write_manifest(found)
    with pytest.raises(InputError, match="names a file outside of its folder"):
        folders.read_manifest(folder)


def test_a_file_that_runs_code_is_not_loaded(tmp_path):
    """Its SHA-256 may fit: it is read as tensors and plain values all the same."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "run.ckpt"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with path.open("rb") as file:
        mark = folders.mark_of(file)
    with pytest.raises(InputError, match="is not a checkpoint that can be read"):
        checkpoint.load(path, mark)
    assert not (tmp_path / "ran").exists()


def test_the_order_of_checkpoints(tmp_path):
    for step, save in ((7, 1), (100_000_000, 1), (20, 10), (20, 2), (20, 1)):
        write(tmp_path, step, save)
    (tmp_path / folders.CHECKPOINTS / "step-00000030").mkdir()
    (tmp_path / folders.CHECKPOINTS / "notes").mkdir()
    whole = ["step-00000007", "step-00000020", "step-00000020-2", "step-00000020-10",
             "step-100000000"]  # fmt: skip
    assert names(folders.whole_folders(tmp_path)) == whole
    assert names(folders.checkpoint_folders(tmp_path)) == [*whole[:-1], "step-00000030", whole[-1]]


def test_partial_and_old_ones_go_and_damaged_ones_stay(tmp_path):
    kept = [write(tmp_path, step) for step in (10, 20, 30)]
    killed = tmp_path / folders.CHECKPOINTS / "step-00000040"
    killed.mkdir()
    (killed / ".run.ckpt.partial").write_bytes(b"half")
    folders.remove_partial(tmp_path)
    assert folders.checkpoint_folders(tmp_path) == kept
    folders.set_aside(kept[2])
    assert (kept[0].parent / "step-00000030.damaged" / "run.ckpt").is_file()
    write(tmp_path, 30)
    folders.remove_old(tmp_path, 2)
    assert names(folders.checkpoint_folders(tmp_path)) == ["step-00000020", "step-00000030"]
    assert (kept[0].parent / "step-00000030.damaged" / "run.ckpt").is_file()


def test_the_one_of_the_best_weights_is_kept_beside_the_last(tmp_path):
    for step, save in ((10, 1), (20, 1), (20, 2), (30, 1), (40, 1)):
        write(tmp_path, step, save)
    folders.remove_old(tmp_path, 1, best=20)
    assert names(folders.checkpoint_folders(tmp_path)) == ["step-00000020-2", "step-00000040"]
    folders.remove_old(tmp_path, 1, best=40)
    assert names(folders.checkpoint_folders(tmp_path)) == ["step-00000040"]


def test_a_folder_that_is_half_removed_is_not_whole(tmp_path, monkeypatch):
    folder = write(tmp_path, 10)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **options: None)
    folders.remove(folder)
    assert folders.whole_folders(tmp_path) == []
    assert (folder / "run.ckpt").is_file()


def test_one_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(tmp_path, monkeypatch):
    """As by a training that goes on and keeps one."""
    old = write(tmp_path, 10)

    def read(path, reader):
        if path == old:
            write(tmp_path, 20)
            folders.remove_old(tmp_path, 1)
        return {"step": folders.read_manifest(path).step}

    monkeypatch.setattr(checkpoint_reading, "read", read)
    found = checkpoint_reading.read_newest(tmp_path)
    assert (found.state, found.damaged) == ({"step": 20}, [])


def test_one_that_is_removed_while_they_are_listed(tmp_path, monkeypatch):
    gone = write(tmp_path, 10)
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    listed = folders.whole_folders(tmp_path)
    folders.remove(gone)
    monkeypatch.setattr(checkpoint_reading, "whole_folders", lambda run: listed)
    assert checkpoint_reading.checkpoints(tmp_path) == [tmp_path / "last.ckpt", gone]


def test_no_checkpoints(tmp_path):
    assert folders.whole_folders(tmp_path) == []
    (tmp_path / folders.CHECKPOINTS).write_text("a file")
    assert folders.whole_folders(tmp_path) == []
