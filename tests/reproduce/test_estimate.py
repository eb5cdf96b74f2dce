"""The cost of a reproduction against real bytes of real runs, and against clocks that we set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastdml.devices import device_name
from fastdml.errors import InputError
from fastdml.report.metrics_log import INDEPENDENT, METRICS
from fastdml.report.summary import SUMMARY
from fastdml.reproduce.estimate import (
    COSTS,
    Estimate,
    Measured,
    Run,
    estimate,
    image_counts,
    measured,
)
from fastdml.train.config.sources import preset
from fastdml.train.run import run as train
from fastdml.train.tasks.reid import STANDIN

CPU = torch.device("cpu")
TINY = {
    "peers": ("resnet8", "resnet8"),
    "iterations": 3,
    "batch_size": 32,
    "deterministic": True,
    "threads": 1,
    "device": "cpu",
    "tensorboard": False,
    "figures": (),
}
KNOWN = Measured(step=2.0, image=0.01, weights=10**6, state=10**6, tensors=10, memory=None)


def config_of(folder, **changes):
    return preset("digits", **{**TINY, "folder": str(folder), **changes})


def bytes_below(folder: Path) -> int:
    """On the disk, where a file may have several names."""
    found = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return sum(found.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"independent": True},
        pytest.param({"groups": 2, "peers": ("resnet8",) * 4}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "adam", "lr": 1e-3, "tensorboard": True}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"iterations": 0, "epochs": 2, "figures": ("png",), "log_every": 5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_files_are_within_a_fifth_of_the_real_ones(tmp_path, changes):
    config = config_of(tmp_path / "run", **changes)
    found = estimate([Run("run", config, False)], tmp_path, "cpu", keep=True)
    train(config)
    real = bytes_below(tmp_path / "run")
    assert found.disk == pytest.approx(real, rel=0.2)
    again = estimate([Run("run", config, False)], tmp_path, "cpu")
    assert again.disk == max(0, found.disk - real)  # what is there needs no more room


def test_time_is_that_of_steps_and_of_evaluations(tmp_path):
    ticks = iter(range(1000))
    run = Run("run", config_of(tmp_path / "run", batch_size=5), False, ("resnet8",))
    found = measured(run, CPU, clock=lambda: 2.0 * next(ticks))
    assert (found.step, found.image) == (2.0, 2.0 / 5)
    disturbed = iter([0, 9, 9, 10, 10, 14, 14, 17, *range(20, 40)])  # 9, then 1, 4 and 3
    assert measured(run, CPU, clock=lambda: next(disturbed)).step == 1.0  # the 9 says: one more
    disturbed = iter([0, 5, 9, 10, 10, 14, 14, 17, *range(20, 40)])
    assert measured(run, CPU, clock=lambda: next(disturbed)).step == 3.0
    assert found.memory is None
    assert found.weights > found.state > 0  # momentum has no statistics of BatchNorm
    config = config_of(tmp_path / "run", iterations=0, epochs=10, eval_every=4, independent=True)
    cost = estimate([Run("run", config, False)], tmp_path, "cpu", measure=lambda *_: KNOWN)
    steps, evaluations = 10 * (1442 // 32), 3
    assert cost.seconds == pytest.approx(2 * (steps * 2.0 + evaluations * 355 * 0.01))


def test_a_run_of_the_training_that_has_ended_tells_the_time(tmp_path):
    ended, new = (config_of(tmp_path / str(seed), seed=seed, independent=True) for seed in range(2))
    (tmp_path / "0").mkdir()
    summary = {name: {"wall_seconds": 50.0} for name in ("mutual", "independent")}
    (tmp_path / "0" / SUMMARY).write_text(json.dumps(summary))
    runs = [Run("run", ended, True), Run("run", new, False), Run("other", new, False)]
    cost = estimate(runs, tmp_path, "cpu", measure=lambda *_: KNOWN)
    of_run, of_other = cost.costs
    assert of_run.seconds == 100.0
    assert of_run.timed == "as a run that has ended"
    assert of_other.seconds == pytest.approx(2 * (3 * 2.0 + 355 * 0.01))
    assert cost.ended == 1
    everything = estimate([Run("run", ended, True)], tmp_path, "cpu")
    assert str(everything) == "1 run has ended: nothing is left to train"


def test_what_is_trained_already_is_not_counted(tmp_path):
    config = config_of(tmp_path / "run", iterations=0, epochs=4, independent=True)
    whole = estimate([Run("run", config, False)], tmp_path, "cpu", measure=lambda *_: KNOWN)
    for folder, epoch in ((tmp_path / "run", 4), (tmp_path / "run" / INDEPENDENT, 1)):
        folder.mkdir()
        records = [
            {"kind": "peers", "step": 0, "names": ["a", "b"]},
            {"kind": "epoch", "step": 45 * epoch, "epoch": epoch},
        ]
        (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    left = estimate([Run("run", config, False)], tmp_path, "cpu", measure=lambda *_: KNOWN)
    assert left.seconds == pytest.approx(whole.seconds * 3 / 8)
    assert left.disk == whole.disk - bytes_below(tmp_path / "run")


def test_what_was_measured_is_kept(tmp_path):
    config, asked = config_of(tmp_path / "run"), []

    def measure(run, device):
        asked.append(run.name)
        return KNOWN

    folder = tmp_path / "trainings"
    for keep in (False, True, True):
        estimate([Run("run", config, False)], folder, "cpu", keep=keep, measure=measure)
    assert asked == ["run", "run"]


@pytest.mark.parametrize(
    "damaged",
    ["", "{}}", "[1]", '{"NAME": 3}', '{"NAME": {"run 2": {"step": 1}}}']
    + ['{"NAME": {"run 2": VALUES}}'.replace("VALUES", json.dumps({**vars(KNOWN), name: value}))
       for name, value in {"step": None, "image": "x", "state": [], "memory": {}}.items()],
)  # fmt: skip
def test_a_damaged_file_of_what_was_measured_is_made_anew(tmp_path, damaged):
    config = config_of(tmp_path / "run")
    (tmp_path / COSTS).write_text(damaged.replace("NAME", device_name(CPU)))
    for _ in range(2):
        found = estimate(
            [Run("run", config, False)], tmp_path, "cpu", keep=True, measure=lambda *_: KNOWN
        )
        assert found.costs[0].spare > KNOWN.weights
    assert json.loads((tmp_path / COSTS).read_text())[device_name(CPU)]["run 2"]["step"] == 2.0


def test_peers_that_cannot_be_measured_are_named_and_the_others_counted(tmp_path):
    def measure(run, device):
        if run.name == "broken":
            raise RuntimeError("no memory\nfor it")
        if run.name == "odd":
            raise ValueError("of a layer")
        return KNOWN

    names = ("broken", "odd", "fine")
    runs = [Run(name, config_of(tmp_path / name), False) for name in names]
    found = estimate(runs, tmp_path, "cpu", measure=measure)
    assert [cost.name for cost in found.costs] == ["fine"]
    assert "broken: not known (no memory for it)" in str(found)
    assert "odd: not known (of a layer)" in str(found)


def test_no_room_is_refused(tmp_path):
    runs = [Run("run", config_of(tmp_path / "run"), False)]
    found = estimate(runs, tmp_path, "cpu", price_per_hour=3.0, measure=lambda *_: KNOWN)
    found.check_room()
    assert "cost    0.00 hours at 3: 0.01" in str(found)
    small = dataclasses.replace(found, free=found.disk + 10)  # not for a checkpoint beside the last
    with pytest.raises(InputError, match=r"are needed and .* are free: make room"):
        small.check_room()
    cost = dataclasses.replace(found.costs[0], memory=9 * 10**9)
    narrow = dataclasses.replace(found, costs=(cost,), device_memory=10**9)
    assert "memory  9,000 MB of 1,000 MB free on the device" in str(narrow)
    with pytest.raises(InputError, match="the largest run needs 9,000 MB of the device's memory"):
        narrow.check_room()
    assert isinstance(found, Estimate)


def test_images_of_each_data_set():
    assert image_counts(preset("cifar100", subset=20_000)) == (20_000, 10_000)
    few = {"subset": 20_000, "labelled": 2000}
    assert image_counts(preset("cifar100", **few)) == (20_000, 10_000)
    assert image_counts(preset("cifar100", **few, unlabelled_share=0)) == (2000, 10_000)
    assert image_counts(preset("market1501")) == (12_936, 23_100)
    shown = STANDIN.train_ids * STANDIN.train_images
    read = STANDIN.test_ids * STANDIN.images + STANDIN.distractors
    assert image_counts(preset("market1501", standin=True)) == (shown, read)
    with pytest.raises(InputError, match="number of images of folder"):
        image_counts(preset("folder"))


def test_the_sizes_are_those_of_the_set():
    from fastdml.data import load

    train_set, test_set = load("digits", "")
    assert (len(train_set), len(test_set)) == image_counts(preset("digits"))
