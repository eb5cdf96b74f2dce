"""A real disk that is full, at each stage of a run: one line, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest
from recovery import Recovery, outcome, said_why

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")

SOME = (  # the file under way, and which of the times that it is opened
    ("config.yaml", 0),
    ("last.ckpt", 3),
    ("summary.json", 0),
)
OTHERS = (
    ("initial.ckpt", 0),
    ("best/peers/01-resnet8-2.safetensors", 0),
    ("independent/last.ckpt", 2),
    ("curves.png", 0),
)


@pytest.fixture
def disk(small_disk):
    """An empty file system of 16 MB."""
    return small_disk(16)


def fill(ballast, left):
    """All of the disk but `left` bytes."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
            file.write(bytes(1 << 12))
    os.truncate(ballast, ballast.stat().st_size - left)


@pytest.mark.parametrize("stages", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_the_disk_fills_up_at_each_stage(breakable, disk, tmp_path, stages):
    """A run is killed where it begins to write a file, finds no room for it, and then some."""
    whole = Recovery(breakable, disk / "run")
    ended = whole.at_event("count", -1)
    assert ended.code == 0, ended.output
    expected, events = outcome(whole.folder), whole.events()
    stopped = []
    for turn, (name, time) in enumerate(stages):
        place, _, file = name.rpartition("/")
        opened = f"open {'/' + place if place else ''}/.{file}.partial"
        number = [at for at, what in enumerate(events) if what == opened][time]
        run = Recovery(breakable, disk / f"run-{turn}")
        assert run.at_event("kill", number).code < 0
        fill(disk / "ballast", left=0 if turn % 2 else 4096)
        ended = run.go()
        assert said_why(ended), (name, ended)
        assert ended.code == 2, (name, ended)
        assert "No space left on device" in ended.output
        stopped.append(ended.output.splitlines()[-1])
        (disk / "ballast").unlink()
        assert run.differences(expected) == [], (name, ended)
        for path in disk.iterdir():
            subprocess.run(["rm", "-r", str(path)], check=True)
    for name, line in zip(stages, stopped, strict=True):
        assert str(disk) in line, name
