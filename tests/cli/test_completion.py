"""What a shell completes: the script is run by bash, as it does at the Tab key."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from fastdml import cli
from fastdml.cli.completion import SHELLS
from fastdml.cli.main import COMMANDS
from fastdml.data import dataset_names
from fastdml.train import ReidConfig

# What bash does at the Tab key: finds the function of the command and calls it with the words.
TAB = """
complete_line() {
  COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  local function; function=$(complete -p fastdml | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
  "$function" fastdml
  printf '%s\\n' "${COMPREPLY[@]}"
}
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Completes a line, given as its words; the words that bash would offer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastdml"])
        folder = tmp_path_factory.mktemp("completion")
        with open(folder / "script", "w") as file, patch.context() as inner:
            inner.setattr(sys, "stdout", file)
            assert cli.main(["completion", "bash"]) == 0
    (folder / "python3").symlink_to(sys.executable)  # without the packages of this one
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)

    def offered(*words: str) -> list[str]:
        command = f'source script; {TAB} complete_line "$@"'
        done = subprocess.run(
            ["bash", "--norc", "-c", command, "bash", "fastdml", *words],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stderr == ""
        return [line for line in done.stdout.splitlines() if line]

    return offered


def test_commands(bash):
    assert set(COMMANDS) <= set(bash(""))
    assert bash("tra") == ["train"]


@pytest.mark.parametrize("command", ["train", "config"])
def test_data_sets(bash, command):
    assert set(dataset_names()) <= set(bash(command, ""))
    assert bash(command, "mark") == ["market1501"]


def test_settings_of_the_data_set(bash):
    offered = set(bash("train", "market1501", "--"))
    assert {f"--{field.name.replace('_', '-')}" for field in fields(ReidConfig)} <= offered
    assert "--no-flip" in offered
    assert "--recipe" not in bash("train", "cifar100", "--")
    assert bash("train", "cifar100", "--lr", "0.1", "--label-s") == ["--label-smoothing"]
    assert "--to" in bash("config", "cifar100", "--")


def test_choices(bash):
    assert bash("train", "cifar100", "--execution", "st") == ["streams", "stacked"]
    assert set(bash("evaluate", "run", "--weights", "")) == {"last", "best"}


def test_no_words_of_descriptions(bash):
    """Whose lines, as they stand in the source, are not what bash offers for an option."""
    assert bash("train", "folder", "--aug") == ["--augment"]
    assert all(word.startswith("--") for word in bash("train", "folder", "--"))


def test_options_of_other_commands(bash):
    offered = bash("evaluate", "--")
    assert {"--weights", "--peers", "--download", "--json"} <= set(offered)
    assert "--no-json" not in offered  # which the command does not have


def test_names_of_files(bash):
    """After an option that takes a path from the script; where it knows nothing, bash's own."""
    assert "python3" in bash("train", "digits", "--folder", "pyth")
    assert bash("evaluate", "pyth") == []


@pytest.mark.parametrize("shell", [name for name in SHELLS if name != "bash"])
def test_other_shells_get_the_same_names(shell, capfd):
    assert cli.main(["completion", shell]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in [*COMMANDS, *dataset_names(), "label-smoothing"])
    assert '-c "$pycode"' not in out  # one argument of more than Linux takes
    # files where the script knows nothing
    assert {"zsh": '-z "$completions"', "fish": 'test -z "$results"'}[shell] in out


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fastdml tra", ["train"]),
        ("fastdml train cifar100 --execution st", ["stacked", "streams"]),
        ("fastdml train digits --folder pic", ["pictures/"]),
        ("fastdml report pic", ["pictures/"]),
    ],
)
def test_fish(line, offered, tmp_path, capfd):
    assert cli.main(["completion", "fish"]) == 0
    (tmp_path / "script").write_text(capfd.readouterr().out)
    (tmp_path / "pictures").mkdir()
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source script; complete -C '{line}'"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr == ""
    assert [found.partition("\t")[0] for found in done.stdout.splitlines()] == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_its_script(tmp_path, capfd):
    assert cli.main(["completion", "zsh"]) == 0
    (tmp_path / "_fastdml").write_text(capfd.readouterr().out)
    done = subprocess.run(["zsh", "-n", str(tmp_path / "_fastdml")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_that_there_is_no_script_for(capfd):
    assert cli.main(["completion", "tcsh"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert cli.main(["completion"]) == 2
