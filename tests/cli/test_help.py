"""What the command says of itself."""

from __future__ import annotations

import re

import pytest

from fastdml import cli
from fastdml.cli.main import COMMANDS
from fastdml.data import dataset_names


def test_help(capfd):
    assert cli.main(["--help"]) == 0
    out = capfd.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert cli.main([]) == 2
    assert cli.main(["train"]) == 0
    assert f"{{{','.join(dataset_names())}}}" in capfd.readouterr().out


def test_help_as_a_command(capfd):
    for asked, same in (
        ("help", "--help"),
        ("help help", "--help"),
        ("help train", "train --help"),
        ("help train digits", "train digits --help"),
        ("help evaluate", "evaluate --help"),
    ):
        outputs = []
        for arguments in (asked, same):
            assert cli.main(arguments.split()) == 0
            outputs.append(capfd.readouterr().out)
        assert outputs[0] == outputs[1]
        assert "usage: fastdml" in outputs[0]


def test_help_of_training_states_the_papers_settings(capfd):
    assert cli.main(["train", "cifar100", "--help"]) == 0
    out = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capfd.readouterr().out).split())
    for text in ("--config", "Paper: 200. (default: 200)", "Paper: 64. (default: 64)"):
        assert text in out
    assert "(default: resnet32 resnet32)" in out
    for unit in ("Images a step", "Pixels", "Epochs", "Minutes"):
        assert unit in out


def test_evaluate_help(capfd):
    assert cli.main(["evaluate", "--help"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("usage: fastdml evaluate RUN [OPTIONS]\n")
    assert "--weights {last,best}" in out
    assert "--json" in out


@pytest.mark.parametrize("columns", [1, 4, 7])
@pytest.mark.parametrize("command", ["train digits", "evaluate", "export", "kernels"])
def test_help_in_narrow_terminals(monkeypatch, capfd, columns, command):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*command.split(), "--help"]) == 0
    assert len(capfd.readouterr().out) < 60_000
