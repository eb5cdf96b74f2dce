"""Runs that are killed, and go on to the same weights, metrics and scores, bit for bit."""

from __future__ import annotations

from random import Random

import pytest
from recovery import Recovery, at_events, one_of_each, outcome, random_kills

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")


def test_killed_at_any_time(warm, tmp_path):
    whole = Recovery(warm, tmp_path / "whole")
    ended = whole.go()
    assert ended.code == 0, ended.output
    expected = outcome(whole.folder)
    assert [*random_kills(warm, tmp_path, expected, ended.seconds, Random(0), 20)] == []


def test_killed_at_every_kind_of_file_event(breakable, tmp_path):
    """Within writes too. A sample of each call on each file; `make soak` takes all events."""
    whole = Recovery(breakable, tmp_path / "whole", "command_without_pictures")
    ended = whole.at_event("count", -1)
    assert ended.code == 0, ended.output
    expected, events = outcome(whole.folder), whole.events()
    for name in ("config.yaml", "initial.ckpt", "last.ckpt", "cohort.json", "summary.json"):
        assert f"rename /{name}" in events
    numbers = Random(0).sample(one_of_each(events, Random(0)), 24)
    assert [*at_events(breakable, tmp_path, expected, "kill", numbers, whole.job)] == []
