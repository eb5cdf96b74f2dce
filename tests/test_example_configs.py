"""examples/configs: each file is what its first lines say, and the command takes it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastdml import cli
from fastdml.train import from_command_line, load_config
from fastdml.train.config.sources import preset
from fastdml.yaml_file import read_settings

FILES = sorted(Path(__file__).resolve().parents[1].glob("examples/configs/*.yaml"))


def command(file: Path) -> list[str]:
    """The command that the comment at the top of a file shows."""
    (found,) = re.findall(r"^#   fastdml train (.+)$", file.read_text(), re.MULTILINE)
    return shlex.split(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_is_loaded_by_the_command_it_shows(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    data, *options = command(file)
    config = from_command_line(data, options)
    assert "--config" in options
    values = read_settings(file)
    assert config.replace(root="data", download=False) == load_config(file)
    given = config.to_dict()
    assert all(given[name] == value for name, value in values.items())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_none_repeats_a_default(file):
    """A line in a file says what is special about it."""
    values = read_settings(file)
    defaults = preset(values["data"], **{n: values[n] for n in ("recipe",) if n in values})
    same = [n for n, v in values.items() if n not in ("data", "recipe", "lr", "peers")
            and defaults.to_dict()[n] == v]  # fmt: skip
    assert not same


def test_those_of_the_paper_have_its_settings():
    for file in (f for f in FILES if "The paper's CIFAR-100" in f.read_text()):
        config = load_config(file)
        assert config == preset("cifar100", peers=config.peers, independent=True)


def test_a_quick_one_runs(tmp_path, monkeypatch, capfd):
    (file,) = (f for f in FILES if f.stem == "quick")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits", "--config", str(file), "--dry-run"]) == 0
    assert "8 epochs" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["cifar100-quick", "market1501-standin"])
def test_others_run_on_real_images(stem, cifar100_root, tmp_path, monkeypatch, capfd):
    (file,) = (f for f in FILES if f.stem == stem)
    monkeypatch.chdir(tmp_path)
    options = ["--root", str(cifar100_root), "--subset", "256", "--execution", "eager", "--dry-run"]
    data = load_config(file).data
    assert cli.main(["train", data, "--config", str(file), *options]) == 0
    assert "nothing was written" in capfd.readouterr().out
