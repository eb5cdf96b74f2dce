"""The settings as a file with comments: read back, it is the same configuration."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdml import cli
from fastdml.data import dataset_names
from fastdml.train import ReidConfig, TrainConfig, from_command_line, load_config
from fastdml.train.config import commented
from fastdml.train.config.commented import commented_yaml
from fastdml.train.config.fields import field_texts
from fastdml.train.config.sources import preset

# Every data set with its defaults, and those with recipes with each; the stand-in.
SOURCES: list[tuple[str, tuple[str, ...]]] = [(data, ()) for data in dataset_names()]
SOURCES += [(d, ("--recipe", r)) for d, r in product(dataset_names("reid"), ("paper", "strong"))]
SOURCES += [("market1501", ("--standin", "--recipe", r)) for r in ("paper", "strong")]


@pytest.mark.parametrize(("data", "options"), SOURCES)
def test_the_printed_settings_give_the_same_configuration(data, options, tmp_path, capfd):
    assert cli.main(["config", data, *options]) == 0
    text = capfd.readouterr().out
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    expected = from_command_line(data, options)
    assert from_command_line(data, ["--config", str(file)]) == expected
    assert load_config(file) == expected
    assert list(yaml.safe_load(text)) == [f.name for f in dataclasses.fields(expected)]


SHARED_FOLDER = [HealthCheck.function_scoped_fixture]  # each example replaces the file
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter(
    lambda text: not text.startswith("~") and "\0" not in text
)


@settings(max_examples=60, deadline=None, suppress_health_check=SHARED_FOLDER)
@given(
    st.fixed_dictionaries(
        {
            "peers": st.lists(TEXT, min_size=1, max_size=3),
            "root": TEXT,
            "folder": st.none() | TEXT,
            "lr": st.floats(1e-12, 1e12),
            "lr_drops": st.sets(st.integers(1, 10**9)).map(sorted),
            "amp": st.sampled_from(["off", "auto", "bf16"]),
            "seed": st.integers(0, 2**63 - 1),
            "margin": st.none() | st.floats(0, 1e9),
        }
    )
)
def test_whatever_the_values_are(tmp_path, values):
    """Names that YAML would read as numbers, dates or truth values, odd characters, long lists."""
    config = preset("market1501", **values)
    file = tmp_path / "settings.yaml"
    file.write_text(commented_yaml(config), encoding="utf-8")
    assert load_config(file) == config


def test_every_setting_has_its_text_above_it_in_the_groups_of_the_class():
    lines = commented_yaml(TrainConfig()).splitlines()
    groups = [line.strip("# -") for line in lines if line.startswith("# ---")]
    texts = list(field_texts(TrainConfig))
    assert groups == list(dict.fromkeys(text.group for text in texts))
    whole = " ".join(line.lstrip("# ") for line in lines)
    assert all(text.text in whole for text in texts)
    above = lines[lines.index("amp: auto") - 1]
    assert above == "# Choices: auto, off, bf16, fp16"
    assert all(len(line) <= commented.WIDTH for line in lines)


def test_of_settings_of_a_subclass_its_own_text():
    text = commented_yaml(preset("market1501"))
    (own,) = (t.text for t in field_texts(ReidConfig) if t.name == "batch_size")
    assert f"# {own}\nbatch_size: 16\n" in text


def test_without_the_sources_the_values_alone(monkeypatch):
    def absent(kind: type) -> None:
        raise OSError("could not get source code")

    monkeypatch.setattr(commented, "field_texts", absent)
    assert yaml.safe_load(commented_yaml(TrainConfig())) == TrainConfig().to_dict()


def test_options_of_training_change_what_is_printed(tmp_path, capfd):
    file = tmp_path / "a b" / "mine.yaml"
    file.parent.mkdir()
    assert cli.main(["config", "digits", "--lr", "0.02", "--to", str(file), "--no-flip"]) == 0
    assert capfd.readouterr().out == f"{file}\n"
    assert load_config(file) == preset("digits", lr=0.02, flip=False)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["cifra10"], "no settings for 'cifra10'; did you mean cifar10"),
        (["digits", "--to"], "--to needs the name of a file"),
        (["digits", "--to", "--lr", "1"], "--to needs the name of a file"),
        (["digits", "--to="], "--to needs the name of a file"),
        (["digits", "--lr", "0"], "lr must be above 0"),
        (["digits", "--learning-rate", "1"], "did you mean --lr"),
    ],
)
def test_mistakes_are_one_line(arguments, pattern, capfd):
    assert cli.main(["config", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert re.search(pattern, err), err


def test_a_file_that_is_there_stays(tmp_path, capfd):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\n")
    assert cli.main(["config", "digits", "--to", str(file)]) == 2
    assert "is there already" in capfd.readouterr().err
    assert file.read_text() == "lr: 0.5\n"


def test_usage(capfd):
    assert cli.main(["config"]) == 0
    assert "--to FILE" in capfd.readouterr().out
