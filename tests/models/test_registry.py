"""A model is one file: registered by name, of fastdml's own folder or of the user's."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import fastdml
from fastdml.cli import main
from fastdml.errors import InputError
from fastdml.models import ReidHead, catalogue, create_model, model_names, register_model, registry

ADDED = """
from torch import nn

from fastdml.models.registry import register_model


@register_model("plain_{width}", listed=("plain_8", "plain_16"), purpose="a test", input="any")
class Plain(nn.Module):
    def __init__(self, width: int, num_classes: int, in_channels: int = 3):
        super().__init__()
        self.num_features = width
        self.features = nn.Conv2d(in_channels, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward_features(self, x):
        return self.features(x)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@register_model("plain_wide")
def wide(num_classes):
    return Plain(64, num_classes)
"""
MISTAKES = """
@register_model("plain_broken")
def broken(num_classes):
    return num_classes / 0


@register_model("plain_number")
def number(num_classes):
    return num_classes
"""


@pytest.fixture
def known(monkeypatch):
    """What a test registers is forgotten."""
    registry.models()
    monkeypatch.setattr(registry, "_KNOWN", dict(registry._KNOWN))


@pytest.fixture
def added(tmp_path, monkeypatch, known):
    """A file in `fastdml/models/`, and nothing else."""
    (tmp_path / "plain.py").write_text(ADDED)
    package = importlib.import_module("fastdml.models")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry._import_models.cache_clear()
    yield
    registry._import_models.cache_clear()
    sys.modules.pop("fastdml.models.plain", None)


@pytest.fixture
def mine(tmp_path, monkeypatch, known):
    """A user's file, not imported yet."""
    (tmp_path / "fastdml_test_plain.py").write_text(ADDED + MISTAKES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "fastdml_test_plain"
    sys.modules.pop("fastdml_test_plain", None)


def test_a_model_is_one_file(added):
    assert {"plain_8", "plain_16", "plain_wide"} <= set(model_names())
    assert create_model("plain_24", 5, in_channels=2)(torch.zeros(1, 2, 8, 8)).shape == (1, 5)
    with pytest.raises(InputError, match="no model 'plain8'; nearest: plain_8"):
        create_model("plain8", 5)
    rows = {row.name: row for row in catalogue(num_classes=5)}
    assert rows["plain_8"] == ("plain_8", 8 * 3 * 9 + 8 + 8 * 5 + 5, "any", "a test", False)
    assert fastdml.Cohort(["plain_8", "resnet8"], 5).names == ["plain_8", "resnet8"]


def test_names_of_a_users_file_are_known_once_it_is_imported(mine):
    with pytest.raises(InputError, match="no model 'plain_8'"):
        create_model("plain_8", 5)
    importlib.import_module(mine)
    assert "plain_8" in model_names()
    assert create_model("plain_8", 5).head.in_features == 8
    assert create_model("plain_wide", 5, in_channels=2).head.in_features == 64
    model = create_model("plain_8", 5, head=ReidHead())
    assert model.eval()(torch.zeros(1, 3, 16, 8)).shape == (1, 5)


def test_names_of_a_users_file_by_its_module(mine):
    """The way to name one on the command line: the module is imported for it."""
    assert create_model(f"{mine}:plain_12", 5, in_channels=2).features.in_channels == 2
    assert create_model(f"{mine}:plain_wide", 5).head.in_features == 64
    with pytest.raises(InputError, match="has no function 'resnet32'"):
        create_model(f"{mine}:resnet32", 5)


def test_mistakes_of_a_users_file_are_one_line(mine):
    importlib.import_module(mine)
    with pytest.raises(InputError, match=r"plain_broken\(num_classes=5\) fails: ZeroDivisionError"):
        create_model("plain_broken", 5)
    with pytest.raises(InputError, match=r"the function returned int, not a torch nn.Module"):
        create_model("plain_number", 5)


def test_a_name_has_one_model(known):
    with pytest.raises(ValueError, match=r"'resnet\{depth\}' is registered by fastdml.models"):
        register_model("resnet{depth}")(lambda depth, num_classes: None)


def test_a_name_of_its_own_comes_before_a_family(known):
    @register_model("resnet32")
    def resnet32(num_classes: int) -> torch.nn.Module:
        return torch.nn.Linear(3, num_classes)

    assert isinstance(create_model("resnet32", 5), torch.nn.Linear)
    assert create_model("resnet20", 5).stage1 is not None


def test_the_catalogue_counts_what_a_model_has():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rows = {row.name: row for row in catalogue(num_classes=10, in_channels=1)}
    assert torch.equal(torch.get_rng_state(), before)
    assert set(model_names()) <= set(rows)
    for name in ("resnet20", "wrn_16_4", "mobilenet"):
        model = create_model(name, 10, in_channels=1)
        assert rows[name].parameters == sum(p.numel() for p in model.parameters())
    assert all(row.purpose and row.input for row in rows.values())


def test_names_need_no_extra():
    code = (
        "import sys\n"
        "from fastdml.models import create_model, model_names\n"
        "model_names(), create_model('resnet8', 10)\n"
        "sys.exit(', '.join({'timm', 'torchvision', 'huggingface_hub'} & {*sys.modules}) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_trains_what_a_users_file_registers(mine, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    peers = [f"{mine}:plain_12", "plain_24"]  # the second is known once the first is imported
    options = ["--epochs", "1", "--subset", "64", "--batch-size", "32", "--folder", "run"]
    assert main(["train", "digits", *options, "--peers", *peers]) == 0
    assert "plain_12" in capfd.readouterr().out
