"""`fastdml models` and `fastdml data`: what there is by name."""

from __future__ import annotations

import json
import sys

import pytest

from fastdml import cli
from fastdml.data import catalogue, dataset_names
from fastdml.models import create_model, model_names


def columns(text: str) -> list[list[str]]:
    """The first two columns of a table, without its head and its notes."""
    return [line.split()[:2] for line in text.splitlines()[2:] if "  " in line]


def test_models_are_listed_with_their_parameters(capfd):
    assert cli.main(["models"]) == 0
    listed = dict(columns(capfd.readouterr().out))
    assert set(model_names()) <= set(listed)
    model = create_model("resnet20", 100)
    assert listed["resnet20"] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_data_sets_are_listed(capfd):
    assert cli.main(["data"]) == 0
    listed = columns(capfd.readouterr().out)
    assert listed == [[known.name, known.task] for known in catalogue()]
    assert {"digits": "classification", "market1501": "reid"}.items() <= dict(listed).items()


@pytest.mark.parametrize("command", ["models", "data"])
def test_lists_as_json(command, capfd):
    assert cli.main([command, "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    names = [row["name"] for row in listed]
    assert set(model_names() if command == "models" else dataset_names()) <= set(names)
    assert all(row["purpose"] for row in listed)


def test_data_takes_no_names(capfd):
    assert cli.main(["data", "resnet20"]) == 2
    assert "resnet20" in capfd.readouterr().err


def test_where_files_are_looked_for(capfd):
    assert cli.main(["data"]) == 0
    lines = {line.split()[0]: line for line in capfd.readouterr().out.splitlines()[2:]}
    assert "cifar-100-python/ or cifar-100-binary/" in lines["cifar100"]
    assert "bounding_box_train, query, bounding_box_test" in lines["market1501"]
    assert all(known.place for known in catalogue() if known.files != "none")


def test_models_of_a_name(capfd):
    timm = pytest.importorskip("timm")
    assert cli.main(["models", "ResNet18"]) == 0
    listed = dict(columns(capfd.readouterr().out))
    assert {"resnet18", "timm:resnet18", "timm:resnet18d"} <= set(listed)
    assert "resnet32" not in listed
    assert cli.main(["models", "timm:resnet18*", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in rows] == [f"timm:{n}" for n in timm.list_models("resnet18*")]
    (plain,) = (row for row in rows if row["name"] == "timm:resnet18")
    assert plain["pretrained"] is True
    assert plain["input"] == "3x224x224"


def test_a_name_that_no_model_has(capfd):
    assert cli.main(["models", "rsnet32"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "no model has 'rsnet32' in its name; nearest: resnet32" in err


def test_without_timm_the_others_are_searched(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["models", "wrn"]) == 0
    out = capfd.readouterr().out
    assert "wrn_28_10" in out
    assert "timm's are not searched: timm is not installed" in out
    assert cli.main(["models", "vit_tiny"]) == 2
    assert "pip install" in capfd.readouterr().err
