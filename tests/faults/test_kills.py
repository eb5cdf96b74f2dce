"""Runs that are killed or lose the disk, and go on to the same weights, metrics and scores, bit for
bit. `make soak` goes on for as long as it is told."""

from __future__ import annotations

from random import Random

import pytest
from recovery import Recovery, at_events, one_of_each, outcome, random_kills

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")

UNDRAWN = "command_without_pictures"


@pytest.fixture(scope="module")
def whole(breakable, tmp_path_factory):
    """What a run leaves that nothing breaks, and its file events."""
    run = Recovery(breakable, tmp_path_factory.mktemp("whole") / "run", UNDRAWN)
    ended = run.at_event("count", -1)
    assert ended.code == 0, ended.output
    return outcome(run.folder), run.events()


SAMPLES = [5, pytest.param(20, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_time(warm, tmp_path, times):
    drawn = Recovery(warm, tmp_path / "drawn")
    ended = drawn.go()
    assert ended.code == 0, ended.output
    expected = outcome(drawn.folder)
    assert [*random_kills(warm, tmp_path, expected, ended.seconds, Random(0), times)] == []


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("mode", ["kill", "power", "full"])
def test_broken_at_file_events(breakable, whole, tmp_path, mode, samples):
    """Killed, also within a write; by a machine that dies with what is not synced; or told that the
    disk is full. Of each call on each file one, and of these a sample."""
    expected, events = whole
    for name in ("config.yaml", "initial.ckpt", "last.ckpt", "cohort.json", "summary.json"):
        assert f"rename /{name}" in events
    random = Random(mode)
    numbers = random.sample(one_of_each(events, random), samples)
    assert [*at_events(breakable, tmp_path, expected, mode, numbers, UNDRAWN)] == []


def test_what_is_not_synced_would_be_found(breakable, whole, tmp_path):
    """A machine dies just after a checkpoint got its name, and its bytes were not on the disk."""
    expected, _ = whole
    run = Recovery(breakable, tmp_path / "run", "command_unsynced")
    run.at_event("count", -1)
    number = [at for at, what in enumerate(run.events()) if what == "rename /last.ckpt"][1] + 1
    (said,) = at_events(breakable, tmp_path, expected, "power", [number], run.job)
    assert "resuming ended with" in said
