"""Wrong arguments of the measuring commands: found before anything is measured, in one line."""

from __future__ import annotations

import sys

import pytest

from bench import host_time, tune


@pytest.mark.parametrize(("option", "name", "words"), [
    ("--before", "", "is no checkout of this repository"),
    ("--json", "none/times.json", "cannot write to"),
])  # fmt: skip
def test_host_time(tmp_path, monkeypatch, capsys, option, name, words):
    monkeypatch.setattr(sys, "argv", ["host_time", option, str(tmp_path / name)])
    monkeypatch.setattr(host_time, "measure", lambda _: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as ended:
        host_time.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_table_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main(["--table", str(tmp_path / "none" / "tiles.json")])
    assert ended.value.code == 2
    assert "give a file elsewhere" in capsys.readouterr().err
