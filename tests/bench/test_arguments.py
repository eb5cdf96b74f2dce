"""Wrong arguments of the measuring commands: found before anything is measured, in one line."""

from __future__ import annotations

import sys

import pytest

from bench import host_time, linear, mesh, mesh_pipeline, time_to_accuracy, tune


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


@pytest.mark.parametrize(
    ("command", "measures"),
    [
        (linear, "measure"),
        (mesh, "run"),
        (mesh_pipeline, "print"),
        (time_to_accuracy, "our_points"),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_figures_that_cannot_be_written(tmp_path, monkeypatch, capsys, command, measures):
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "none/figures.json")])
    monkeypatch.setattr(command, measures, lambda *_: pytest.fail("it measures"), raising=False)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "--json: cannot write to " in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--epochs", "0"), ("--subset", "-1")])
def test_time_to_accuracy_of_nothing(capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        time_to_accuracy.main(wrong)
    assert ended.value.code == 2
    assert "--epochs must be 1 or more" in capsys.readouterr().err


def test_the_time_to_an_accuracy_is_that_of_the_first_evaluation_at_or_above_it():
    points = [(2.0, 19.0), (4.0, 25.0), (6.0, 24.0)]
    assert [time_to_accuracy.reached(points, target) for target in (19, 20, 25, 30)] == [
        *(2.0, 4.0, 4.0, None),
    ]
    slower = [(20.0, 19.0), (40.0, 21.0)]
    text = time_to_accuracy.table(
        {"fastdml.train": points, "usual loop": slower}, "a GPU", 3, 512, commit="x"
    )
    rows = [line.split() for line in text.splitlines() if line[:2].isdigit() and "%" in line]
    assert [row[2:] for row in rows] == [["4.0", "40.0", "10.0"], ["4.0", "-", "-"]]
    assert "scaled down: 512 training images" in text


def test_a_table_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main(["--table", str(tmp_path / "none" / "tiles.json")])
    assert ended.value.code == 2
    assert "give a file elsewhere" in capsys.readouterr().err
