"""The benchmark of the last linear layers with the loss, on a problem that takes no time."""

from __future__ import annotations

import sys

import pytest

from bench import linear


@pytest.mark.parametrize("frozen", [False, True])
def test_contenders_agree_and_are_timed(frozen, monkeypatch):
    monkeypatch.setattr(linear, "ROUNDS", 1)
    seconds = linear.times((12, 4, 30), frozen, compiled=False)
    assert list(seconds)[:3] == ["ours", "layers, mutual_loss", "layers, formula"]
    assert all(0 <= each < float("inf") for each in seconds.values())


def test_a_contender_that_differs_is_no_rival(monkeypatch):
    wrong = {"ours": linear._ours, "half": lambda problem: linear._ours(problem) / 2}
    monkeypatch.setattr(linear, "contenders", lambda frozen, compiled: wrong)
    with pytest.raises(AssertionError, match=r"half differs from ours by 5\.0e-01"):
        linear.times((12, 4, 30), False, compiled=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_peak_begins_anew_and_has_the_gradients():
    """Of 64 MB of gradients; a process's peak before the call does not count."""
    shape = 8, 256, 32000
    least = 2 * shape[1] * shape[2] * 4
    assert least <= linear.extra_bytes("ours", shape, False) < 4 * least


def test_the_table_compares_with_ours():
    rows = [
        {"frozen": frozen, "name": name, "seconds": s, "extra_bytes": m * 2**20}
        for frozen in (False, True)
        for name, s, m in (("ours", 2.0, 100), ("rival", 5.0, 250))
    ]
    assert linear.table(rows, (1, 2, 3), "here").count("rival                       5.000    2.50"
                                                       "      250    2.50") == 2  # fmt: skip
