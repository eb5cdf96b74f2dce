"""How many threads torch gets."""

from __future__ import annotations

import pytest
import torch

from fastdml import host
from fastdml.engine import cpus


def test_a_caller_may_have_lowered_torchs_threads(monkeypatch):
    monkeypatch.setattr(host, "cpus", lambda: 4)
    with cpus.threads(2):
        assert cpus.most() == 2
    with cpus.threads(9):
        assert cpus.most() == 4


@pytest.mark.parametrize(
    ("text", "explicit"),
    [("3", True), ("2,1", True), (" 1 ", True), ("", False), ("0", False), ("many", False)],
)
def test_an_explicit_choice_by_environment(monkeypatch, text, explicit):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert cpus.asked() == (torch.get_num_threads() if explicit else None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpus.asked() is None


def test_threads_are_the_callers_again():
    before = torch.get_num_threads()

    def fails():
        with cpus.threads(before + 2):
            assert torch.get_num_threads() == before + 2
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == before
    with cpus.threads(None):
        assert torch.get_num_threads() == before
