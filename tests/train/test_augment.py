"""The setting `augment`: what it does to crop and mirror, and that runs with it resume exactly."""

from __future__ import annotations

import pytest
import torch

from fastdml import train
from fastdml.cohort import Cohort
from fastdml.data import TorchLoader
from fastdml.errors import InputError
from fastdml.report.metrics_log import read_metrics
from fastdml.train import ReidConfig, TrainConfig, from_command_line, load_config
from fastdml.train.config.sources import preset
from fastdml.yaml_file import CONFIG


def augmentation(config):
    return config.augment, config.pad, config.flip, config.policy


@pytest.mark.parametrize("data", ["digits", "cifar10", "market1501"])
def test_none_turns_off_crop_and_mirror_whatever_their_defaults(data, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("augment: none\n")
    for config in (
        preset(data, augment="none"),
        preset(data).replace(augment="none"),
        from_command_line(data, ["--augment", "none"]),
        from_command_line(data, ["--config", str(file)]),
        from_command_line(data, ["--augment", "none", "--pad", "0", "--no-flip"]),
    ):
        assert augmentation(config) == ("none", 0, False, None)
    config.save(tmp_path / CONFIG)
    assert load_config(tmp_path / CONFIG) == config


def test_policies_leave_crop_and_mirror_on():
    assert augmentation(TrainConfig()) == ("standard", 4, True, None)
    assert augmentation(preset("cifar10", augment="rand")) == ("rand", 4, True, "rand")
    config = from_command_line("market1501", ["--recipe", "strong", "--augment", "trivial"])
    assert augmentation(config) == ("trivial", 10, True, "trivial")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--augment", "none", "--pad", "4"], "augment none and pad 4 contradict each other"),
        (["--augment=none", "--flip"], "augment none and flip contradict each other: leave flip"),
        (["--augment", "nome"], "augment"),
    ],
)
def test_contradictions_are_refused(refused_config, given, says):
    assert says in refused_config("cifar10", given)


@pytest.fixture
def refused_config(capsys):
    def check(data, given):
        from fastdml.cli import main

        assert main(["train", data, *given]) == 2
        message = capsys.readouterr().err.strip()
        assert "\n" not in message
        return message

    return check


def test_a_config_made_by_hand_must_not_contradict_itself():
    with pytest.raises(InputError, match=r"in a TrainConfig: pad=0, flip=False"):
        TrainConfig(augment="none")
    assert augmentation(TrainConfig(augment="none", pad=0, flip=False))[0] == "none"
    assert augmentation(ReidConfig(augment="none", flip=False))[0] == "none"


@pytest.mark.parametrize("loader", ["resident", "dali"])
def test_other_loaders_are_refused_before_anything_is_written(
    refused_config, loader, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("torchvision")
    message = refused_config("digits", ["--augment", "rand", "--loader", loader])
    assert f"not by the {loader} loader: set loader to auto or torch" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_run_resumes_exactly(policy, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    settings = {
        "peers": ["resnet8"], "subset": 48, "batch_size": 16, "schedule": "step", "threads": 1,
        "augment": policy, "figures": (), "tensorboard": False, "execution": "eager",
    }  # fmt: skip
    whole = train.digits(**settings, epochs=2, folder="whole")
    train.digits(**settings, epochs=1, folder="parts")
    train.digits(resume=True, epochs=2, folder="parts")
    ours, theirs = (Cohort.load(folder).state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [r["loss"] for r in read_metrics("parts") if r["kind"] == "epoch"] == [
        r["loss"] for r in whole.history
    ]
    with pytest.raises(InputError, match="augment was"):
        train.digits(resume=True, epochs=3, folder="parts", augment="standard")


def test_fit_records_the_policy_of_its_loader(tmp_path):
    pytest.importorskip("torchvision")
    from tiny_runs import make_cohort, make_images, make_loaders

    loader = TorchLoader(make_images(32, 1), 16, train=True, pad=1, policy="rand", workers=0)
    config = TrainConfig(epochs=1, figures=(), tensorboard=False, augment="none", pad=0, flip=False)
    result = train.fit(make_cohort(), loader, None, config.replace(folder=str(tmp_path / "a")))
    assert augmentation(result.config) == ("rand", 1, True, "rand")
    plain = make_loaders()[0]
    result = train.fit(make_cohort(), plain, None, config.replace(folder=str(tmp_path / "b")))
    assert augmentation(result.config) == ("standard", 1, False, None)
