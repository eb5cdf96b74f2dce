"""Files are whole or not there, whatever ends their writing; nothing is written through a link."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdml import files
from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.files import (
    draft_folder,
    partial,
    replacing,
    safe_name,
    write_atomically,
    writing,
)
from fastdml.report.metrics_log import MetricsLog
from fastdml.train import TrainConfig, checkpoint


@contextmanager
def no_room(limit: int):
    """Files cannot grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cohort() -> Cohort:
    return Cohort([nn.Linear(4, 3), nn.Linear(4, 3)])


WRITERS = {
    "text": lambda folder: write_atomically(folder / "text", "some words"),
    "last.ckpt": lambda folder: checkpoint.save(folder / "last.ckpt", {"w": torch.ones(9)}),
    "cohort.json": lambda folder: cohort().save(folder),
    "peers/00-Linear-1.safetensors": lambda folder: cohort().save(folder),
    "config.yaml": lambda folder: TrainConfig().save(folder / "config.yaml"),
    "metrics.jsonl": lambda folder: MetricsLog(folder, ["a"], tensorboard=False).close(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_planted_link_is_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("not yours")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    partial(path).symlink_to(victim)
    WRITERS[name](tmp_path / "run")
    assert victim.read_text() == "not yours"
    assert path.stat().st_size > 0
    assert not path.is_symlink()
    assert not os.path.lexists(partial(path))


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_kill_left_is_overwritten(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    partial(path).write_bytes(bytes(10_000_000))  # longer than what replaces it
    WRITERS[name](tmp_path)
    assert path.stat().st_size < 100_000
    assert not partial(path).exists()


@pytest.mark.parametrize("name", WRITERS)
def test_no_room_leaves_nothing_half_written(tmp_path, name):
    (tmp_path / "peers").mkdir()
    with no_room(4), pytest.raises(InputError, match=r"cannot write.*File too large") as error:
        WRITERS[name](tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["peers"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_on_disk_before_it_gets_its_name_and_the_name_before_it_counts(
    tmp_path, monkeypatch, name
):
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(fd):
        order.append(os.path.realpath(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def note_replace(a, b):
        order.append(f"rename {b}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    WRITERS[name](tmp_path)
    path = tmp_path / name
    written, renamed = order.index(str(partial(path))), order.index(f"rename {path}")
    assert written < renamed < len(order) - order[::-1].index(str(path.parent)) - 1


def test_what_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "text").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*text: Is a directory"):
        write_atomically(tmp_path / "text", "words")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
    partial(tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*other: Is a directory"):
        write_atomically(tmp_path / "other", "words")
    with pytest.raises(InputError, match=r"cannot write .*none/text: No such file"):
        write_atomically(tmp_path / "none/text", "words")


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "text", b"bytes")
    finally:
        os.umask(before)
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640
    assert Path(tmp_path / "text").read_bytes() == b"bytes"


def test_of_several_writers_at_once_the_last_wins(tmp_path):
    """As threads of one process do, and processes of two containers, which have the same number."""
    path = tmp_path / "cache"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(bytes([1 // 0]))
    assert path.read_bytes() == b"first"
    with draft_folder(path) as one, draft_folder(path) as other:
        (one / "words").write_text("words")
        assert not [*other.iterdir()]
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


HOLD = """
import pathlib, sys
from fastdml.files import draft_folder, replacing
path = pathlib.Path(sys.argv[1])
with replacing(path) as file, draft_folder(path.with_name("set")) as folder:
    file.write(b"words")
    (folder / "words").write_text("words")
    print(flush=True)
    sys.stdin.read()
"""


def held(path):
    """A process that writes `path` until it is told to end."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    return other


def test_what_killed_processes_left_goes_with_the_next_writing_and_what_others_write_stays(
    tmp_path,
):
    path = tmp_path / "a[b]"
    alien = tmp_path / ".a[b].x.partial"
    alien.write_text("somebody's")
    victim = tmp_path / "victim"
    victim.write_text("not yours")
    (tmp_path / ".a[b].7.partial").symlink_to(victim)
    killed = held(path)
    earlier = {p.name for p in tmp_path.glob(".*.partial")}
    alive = held(path)
    of_alive = {p.name for p in tmp_path.glob(".*.partial")} - earlier
    killed.kill()
    killed.wait()
    assert len([*tmp_path.glob(".*.partial")]) == 2 + 2 * 2
    with replacing(path) as file, draft_folder(tmp_path / "set"):
        file.write(b"mine")
    assert path.read_bytes() == b"mine"
    left = {p.name for p in tmp_path.glob(".*.partial")}
    assert left == {alien.name, ".a[b].7.partial", *of_alive}
    assert victim.read_text() == "not yours"
    alive.communicate()
    assert alive.returncode == 0
    assert path.read_bytes() == b"words"


def test_a_part_that_was_taken_for_abandoned_before_it_was_locked_is_made_again(
    tmp_path, monkeypatch
):
    usual, taken = files.fcntl.flock, []

    def flock(lock, how):
        if not taken:
            taken.extend(tmp_path.glob(".cache.*.partial"))
            taken[0].unlink()
        usual(lock, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with replacing(tmp_path / "cache") as file:
        file.write(b"words")
    assert taken
    assert (tmp_path / "cache").read_bytes() == b"words"
    monkeypatch.setattr(files.fcntl, "flock", refuses)  # as a file system without locks
    with replacing(tmp_path / "cache") as file, draft_folder(tmp_path / "folder") as folder:
        file.write(b"others")
        folder.rename(tmp_path / "folder")
    assert (tmp_path / "cache").read_bytes() == b"others"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "folder"]


def refuses(lock, how):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20-1", "resnet20-1"),
        ("timm:convnext_tiny.in12k", "timm_convnext_tiny.in12k"),
        ("../größe\0\n日", ".._gr__e___"),
        ("x" * 300, "x" * 100),
    ],
)
def test_a_name_that_is_part_of_a_files_name_is_safe_on_any_system(name, expected):
    assert safe_name(name) == expected
    assert safe_name(name, 4) == expected[:4]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device: make room"),
        (errno.EROFS, "Read-only file system: choose another place"),
        (errno.EACCES, "Permission denied: choose another place"),
    ],
)
def test_the_remedy_is_that_of_the_reason(number, remedy):
    told = pytest.raises(InputError, match=f"^cannot write table.csv: {remedy}$")
    with told, writing(Path("table.csv")):
        raise OSError(number, os.strerror(number))
