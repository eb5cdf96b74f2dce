"""A reproduction that is killed at any moment, by any signal, ends with the table of one that was
left alone."""

from __future__ import annotations

import signal
from pathlib import Path
from random import Random

import pytest
from recovery import differences
from tiny_scale import arguments, values
from warm import SIGKILLED, Ended, Warm

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


def broken(warm: Warm, folder: Path, seconds: float, random: Random, count: int) -> list[str]:
    """Kills a reproduction that takes `seconds` until it has ended, by SIGKILL and SIGTERM in
    turn, at most `count` times; what was wrong about how it ended each time."""
    wrong = []
    for kill in range(count):
        by = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        ended = go(warm, folder, "--seeds", "1", kill_after=random.uniform(0, seconds / 2), by=by)
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


@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment(warm, tmp_path, count):
    whole = go(warm, tmp_path / "whole", "--seeds", "1")
    assert whole.code == 0, whole.output
    expected = values(tmp_path / "whole")
    assert expected.keys() >= {"table2", "distillation", "table2.csv"}

    random = Random(count)
    wrong = broken(warm, tmp_path / "broken", whole.seconds, random, count)
    ended = go(warm, tmp_path / "broken", "--seeds", "1")
    assert ended.code == 0, ended.output
    assert wrong == []
    assert differences(values(tmp_path / "broken"), expected) == []
