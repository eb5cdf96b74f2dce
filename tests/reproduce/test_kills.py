"""A reproduction that is killed at any moment, by any signal, ends with the table of one that was
left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from recovery import differences
from tiny_scale import arguments, values
from warm import HERE, SIGKILLED, Ended, Warm

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")

JOB = "tiny_scale.command"
STOPPED = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def warm():
    with Warm() as server:
        yield server


def go(warm: Warm, folder: Path, *options: str, **breaking) -> Ended:
    given = [*arguments(folder), *options]
    return warm.run(JOB, given, folder.with_suffix(".log"), **breaking)


def broken(
    warm: Warm, folder: Path, seconds: float, random: Random, count: int, *options: str
) -> list[str]:
    """Kills a reproduction that takes `seconds` until it has ended, by SIGKILL and SIGTERM in
    turn, at most `count` times; what was wrong about how it ended each time."""
    wrong = []
    for kill in range(count):
        by = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        ended = go(warm, folder, *options, kill_after=random.uniform(0, seconds / 2), by=by)
        if ended.code == 0:
            return wrong
        if by == signal.SIGKILL:
            fine = ended.code == SIGKILLED
        else:  # by the signal itself, as long as nothing has begun that could be lost
            fine = ended.code == -signal.SIGTERM or (
                ended.code == STOPPED and ended.output.endswith("the same command goes on\n")
            )
        wrong += [] if fine else [f"ended with {ended.code}: {ended.output}"]
    return wrong


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment(warm, tmp_path, count):
    whole = go(warm, tmp_path / "whole", "--seeds", "1")
    assert whole.code == 0, whole.output
    expected = values(tmp_path / "whole")
    assert expected.keys() >= {"table2", "distillation", "table2.csv"}

    random = Random(count)
    wrong = broken(warm, tmp_path / "broken", whole.seconds, random, count, "--seeds", "1")
    ended = go(warm, tmp_path / "broken", "--seeds", "1")
    assert ended.code == 0, ended.output
    assert wrong == []
    assert differences(values(tmp_path / "broken"), expected) == []


@pytest.mark.slow
def test_several_at_once(warm, tmp_path):
    """In processes of their own, which end with their parent, saved, however that ends."""
    whole = go(warm, tmp_path / "whole")
    assert whole.code == 0, whole.output
    folder = tmp_path / "broken"
    began = time.monotonic()
    undisturbed = go(warm, tmp_path / "undisturbed", "--jobs", "2", limit=600)
    seconds = time.monotonic() - began
    assert undisturbed.code == 0, undisturbed.output
    assert differences(values(tmp_path / "undisturbed"), values(tmp_path / "whole")) == []
    wrong = broken(warm, folder, seconds, Random(0), 4, "--jobs", "2")
    ended = go(warm, folder, "--jobs", "2", limit=600)
    assert ended.code == 0, ended.output
    assert wrong == []
    assert differences(values(folder), values(tmp_path / "whole")) == []


@pytest.mark.slow
def test_smoke_on_real_images_killed_at_any_moment(cifar100_root, tmp_path):
    """The command as it is typed, against one that is left alone."""

    def start(folder: Path) -> subprocess.Popen:
        words = ["reproduce", "table2:resnet32+resnet32", "--scale", "smoke", "--seeds", "1"]
        places = ["--root", str(cifar100_root), "--folder", str(folder), "--device", "cpu"]
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parents[1] / "kernels"), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with folder.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fastdml", *words, *places],
                stdout=log,
                stderr=log,
                env=environment,
            )

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - began
    random, ends = Random(0), []
    for kill in range(4):
        process = start(tmp_path / "broken")
        try:
            ends.append(process.wait(random.uniform(0, seconds / 2)))
            break
        except subprocess.TimeoutExpired:
            process.send_signal((signal.SIGKILL, signal.SIGTERM)[kill % 2])
            ends.append(process.wait())
    assert start(tmp_path / "broken").wait() == 0
    assert set(ends) <= {SIGKILLED, -signal.SIGTERM, STOPPED, 0}
    found, expected = (values(tmp_path / name, "smoke") for name in ("broken", "whole"))
    assert differences(found, expected) == []
    assert len(expected["table2"]["rows"]) == 2
