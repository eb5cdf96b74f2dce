"""`fastdml models` and `fastdml data`: what there is by name."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize("command", ["models", "data"])
def test_lists_take_no_names(command, capfd):
    assert cli.main([command, "resnet20"]) == 2
    assert "resnet20" in capfd.readouterr().err
