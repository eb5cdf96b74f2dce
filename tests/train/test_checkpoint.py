"""A checkpoint is whole or not there, and holds data only."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch

from fastdml.errors import InputError
from fastdml.train import checkpoint


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"w": torch.arange(1000.0), "step": 7, "name": "a", "none": None})
    return path


def test_round_trip(path):
    state = checkpoint.load(path)
    assert torch.equal(state["w"], torch.arange(1000.0))
    assert (state["step"], state["name"], state["none"]) == (7, "a", None)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_save_that_dies_halfway_leaves_the_old_one(path, monkeypatch):
    def die(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(InputError, match=r"the one before it is kept.*No space left"):
        checkpoint.save(path, {"step": 8})
    assert checkpoint.load(path)["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_the_file_is_on_disk_before_its_name_and_the_folder_after(path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(fd):
        order.append("folder" if Path(f"/proc/self/fd/{fd}").resolve().is_dir() else "file")
        fsync(fd)

    def note_replace(a, b):
        order.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoint.save(path, {"step": 8})
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("keep", [0, 10, 1000, -200])
def test_truncated_files_are_named(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"last\.ckpt is not a checkpoint that can be read"):
        checkpoint.load(path)


@pytest.mark.parametrize("at", range(0, 3000, 100))
def test_a_byte_that_changed_is_noticed(path, at):
    """Or did not matter: a file has gaps."""
    before = checkpoint.load(path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 0x41
    path.write_bytes(content)
    try:
        after = checkpoint.load(path)
    except InputError:
        return
    assert torch.equal(after.pop("w"), before.pop("w"))
    assert after == before


def test_a_full_disk(path):
    """Torch hides what the system said behind an error of its own."""
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError) as error:
            checkpoint.save(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"cannot write the checkpoint {path} (the one before it is kept): File too large: "
        "make room and resume"
    )
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("hacked",))


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_code_in_a_file_is_not_run(path, monkeypatch, write):
    monkeypatch.chdir(path.parent)
    write({"format": 1, "x": Attack()}, path)
    with pytest.raises(InputError, match="not a checkpoint that can be read"):
        checkpoint.load(path)
    assert not Path("hacked").exists()


def test_other_files_are_refused(path, tmp_path):
    torch.save({"format": 99}, path)
    with pytest.raises(InputError, match="format 99, not 1"):
        checkpoint.load(path)
    torch.save(torch.ones(2), path)
    with pytest.raises(InputError, match="format None, not 1"):
        checkpoint.load(path)
    with pytest.raises(InputError, match=r"there is no checkpoint .*none\.ckpt"):
        checkpoint.load(tmp_path / "none.ckpt")


@contextlib.contextmanager
def as_nobody():
    """Root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read_is_not_called_damaged(path):
    path.chmod(0)
    with as_nobody(), pytest.raises(InputError, match=r"cannot read .*last\.ckpt: Permission"):
        checkpoint.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"cannot read .*last\.ckpt: Is a directory"):
        checkpoint.load(path)
    path.rmdir()
    path.symlink_to(path.name)
    with pytest.raises(InputError, match=r"cannot read .*last\.ckpt: Too many levels of symbolic"):
        checkpoint.load(path)


def worker_died(*_):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


class Stopping(SystemExit):
    pass


def stop(*_):
    raise Stopping


@pytest.mark.parametrize(
    ("handler", "raised"),
    [
        (signal.default_int_handler, KeyboardInterrupt),
        (worker_died, RuntimeError),
        (stop, Stopping),
    ],
)
@pytest.mark.parametrize("at", [1, 3, 8])
def test_what_a_signal_raises_in_mid_save_stays_what_it_is(path, monkeypatch, handler, raised, at):
    """Torch's writer hides it behind "unexpected pos"."""

    class File(io.FileIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    monkeypatch.setattr("fastdml.files.create", lambda path: File(path, "x"))
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(raised) as error:
            checkpoint.save(path, {"w": torch.zeros(1000), "v": torch.ones(10)})
    finally:
        signal.signal(signal.SIGINT, before)
    assert "unexpected pos" not in str(error.value)
    assert checkpoint.load(path)["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
