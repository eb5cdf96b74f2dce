"""The measurements of what goes wrong, small, and the tables that docs/faq.md has of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bench import traps, traps_page
from fastdml.reproduce.statistics import difference

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("independent", "mutual")


@pytest.fixture
def short(monkeypatch):
    """One epoch of one batch."""
    for name, value in (("EPOCHS", 1), ("IMAGES", 40), ("BATCH", 32), ("HELD_OUT", 50)):
        monkeypatch.setattr(traps, name, value)
    monkeypatch.setattr(
        traps.trained, "__kwdefaults__", {**traps.trained.__kwdefaults__, "epochs": 2}
    )
    for found in (traps.digits, traps.usual):
        found.cache_clear()
    yield
    for found in (traps.digits, traps.usual):
        found.cache_clear()


def test_peers_that_begin_alike_stay_alike_and_learn_as_if_alone(short):
    found = traps.identical(0)
    assert found["largest divergence of a step"] == 0
    assert found["largest difference of a weight"] == 0
    assert found["identical, mutual"] == found["identical, independent"]


def test_dml_and_dml_e_end_with_the_same_weights(short):
    found = traps.mean_as_target(0)
    assert found["largest difference of a weight"] == 0
    assert found["KL term, DML_e"] < found["KL term, DML"]


def test_held_out_images_are_neither_trained_nor_tested_on(short):
    found = traps.digits(1)
    trained = {image.numpy().tobytes() for image in traps._all_of(found.train)[0]}
    held_out = [image.numpy().tobytes() for image in found.held_out[0]]
    tested = {image.numpy().tobytes() for image in found.test[0]}
    assert len(held_out) == 50
    assert not trained & set(held_out)
    assert not tested & set(held_out)


def test_a_teacher_in_train_mode_is_another_teacher(short):
    network = torch.nn.BatchNorm1d(3)
    x = torch.randn(8, 3) + 2
    network.eval()
    assert torch.equal(network(x), (x / (1 + network.eps) ** 0.5))
    assert traps.InTrainMode(network)(x).mean().abs() < 1e-5


def test_the_mean_of_batch_means_is_off(short):
    found = traps.mean_of_means(0)
    gap = abs(found["accuracy, of batches"] - found["accuracy, of images"])
    assert found["error of the accuracy"] == pytest.approx(gap)
    assert found["error of the gradient, percent"] > 0


def test_without_its_square_the_temperature_takes_most_of_the_gradient(short):
    found = traps.temperature(0)
    full, forgotten = (found[f"KL gradient, {name}"] for name in list(traps.TEMPERATURES)[1:])
    assert full == pytest.approx(16 * forgotten, rel=1e-4)


def test_the_forms_of_mobilenet():
    found = traps.mobilenet(0)
    assert len({found[f"parameters, {form}"] for form in traps.FORMS}) == 1
    assert [found[f"side of the last map, {form}"] for form in traps.FORMS] == [4, 2, 1]
    assert round(found["multiply-adds, CIFAR form"] / 1e6) == 176  # as fastdml/models/mobilenet.py


def test_what_is_measured_is_not_measured_again(tmp_path):
    calls = []

    def one(seed):
        calls.append(seed)
        if seed == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return {"x": float(seed)}

    to = tmp_path / "traps.json"
    with pytest.raises(KeyboardInterrupt):
        traps.measure_all({"a": (one, range(3))}, to)
    assert list(json.loads(to.read_text())["measurements"]["a"]) == ["0"]
    traps.measure_all({"a": (one, range(3))}, to)
    assert calls == [0, 1, 1, 2]
    found = json.loads(to.read_text())
    assert [found["measurements"]["a"][s]["values"]["x"] for s in "012"] == [0, 1, 2]
    assert {"command", "versions", "commit", "device", "date"} <= set(found["provenance"])


def made_up(values: dict[str, list[float]]) -> dict:
    seeds = range(len(next(iter(values.values()))))
    return {str(s): {"values": {name: of[s] for name, of in values.items()}} for s in seeds}


def test_a_table_says_what_is_clear_and_what_is_not():
    numbers = {
        "independent": [90.0, 91.0, 92.0],
        "mutual": [90.5, 90.5, 92.5],
        "reverse": [80.0, 80.1, 82.2],
        "no teacher": [90.0, 90.0, 90.0],
        "taught in eval mode": [89.9, 89.0, 80.0],
        "taught in train mode": [89.91, 89.0, 90.0],
    }
    found = {"measurements": {"direction": made_up(numbers), "teacher-mode": made_up(numbers)}}
    assert traps_page.table("direction", found).splitlines() == [
        "| 3 seeds | measured | difference |",
        "| --- | --- | --- |",
        "| independent | 91.00 ± 1.00 % |  |",
        "| mutual | 91.17 ± 1.15 % | +0.17 (-1.27 to +1.60) against independent: no clear effect |",
        "| KL in the other direction | 80.77 ± 1.24 % | -10.40 (-10.65 to -10.15) against mutual |",
    ]
    taught, other = traps_page.table("teacher-mode", found).splitlines()[3:]
    assert taught.endswith("against no teacher: no clear effect, though lower on each seed |")
    assert other.endswith("against taught in eval mode: no clear effect |")  # once the same


def test_a_table_of_numbers_that_are_all_the_same():
    labels = [row.label for row in traps_page.TABLES["identical"]]
    numbers = {label: [95.0, 96.0] for label in labels} | {
        label: [0.0, 0.0] for label in labels if label.startswith("largest")
    }
    table = traps_page.table("identical", {"measurements": {"identical": made_up(numbers)}})
    assert "| 0 on each seed against identical start, independent |" in table
    assert "| largest KL in any step | 0 nats |  |" in table


def test_sentences_of_the_page_follow_from_the_numbers():
    """What it says beside its tables, of single seeds and of what is clear."""
    stored = json.loads(traps_page.RESULTS.read_text())["measurements"]

    def of(name: str, *labels: str) -> list[list[float]]:
        return [[one["values"][label] for one in stored[name].values()] for label in labels]

    def clear(name: str, *labels: str) -> bool:
        return difference(*of(name, *labels)).clear

    budgets = (1, 2, 5, 10, 20, 40)
    gains = [difference(*of("budgets", *(f"{p}, {n} epochs" for p in PHASES))) for n in budgets]
    assert [n for n, found in zip(budgets, gains, strict=True) if found.clear] == [20]
    shown = of("class-mean", *(f"apart, {p}" for p in (*PHASES, "mean over classes")))
    assert all(low < mid < high for high, low, mid in zip(*shown, strict=True))
    for pair in (("mutual", "not detached"), ("apart, mutual", "apart, not detached")):
        assert all(b < a for a, b in zip(*of("detach", *pair), strict=True))
        assert not clear("detach", *pair)
    unclear = (
        ("class-mean", "mutual", "mean over classes"),
        ("temperature", "mutual", "T = 4, with T squared"),
        ("temperature", "mutual", "T = 4, without"),
        ("ensemble", "ensemble, independent", "ensemble, mutual"),
        ("teacher-mode", "no teacher", "taught in eval mode"),
        ("teacher-mode", "taught in eval mode", "taught in train mode"),
    )
    assert not any(clear(*these) for these in unclear)
    for name in ("class-mean", "detach", "direction", "ensemble"):
        labels = ("one independent peer", "one mutual peer") if name == "ensemble" else PHASES
        assert of(name, *labels) == of("detach", *PHASES), name  # the same runs


def test_every_measurement_is_in_the_results_and_on_the_page():
    page = (ROOT / "docs" / "faq.md").read_text()
    shown = set(re.findall(r"<!-- generated: traps (\S+) -->", page)) - {"provenance"}
    stored = json.loads(traps_page.RESULTS.read_text())["measurements"]
    assert shown == set(stored) == {*traps.MEASUREMENTS, traps.TRAINED} == set(traps_page.TABLES)
    for name, seeds in stored.items():
        labels = {row.label for row in traps_page.TABLES[name]}
        assert all(labels <= set(one["values"]) for one in seeds.values()), name
