"""A third task, defined in this file alone: several labels an image, each right or wrong.

Each picture is bright or not on its left and at its top. Peers tell the four combinations apart,
and are judged by how often they get both labels right. Nothing but the task's and the data set's
registration makes it known to training, reports and commands.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from runs import logged, same_weights

import fastdml
from fastdml import cli
from fastdml.cli.evaluate import evaluate
from fastdml.cohort import Cohort
from fastdml.data import HINT, ImageSet, ResidentLoader, register_dataset, registry
from fastdml.errors import InputError
from fastdml.modes import evaluating
from fastdml.report.scoring import Headline, Scoring
from fastdml.report.tables import fixed_columns
from fastdml.train import ReidConfig, TrainConfig, fit, load_config, run
from fastdml.train.batches import as_batches
from fastdml.train.config.sources import preset
from fastdml.train.tasks import task as tasks
from fastdml.train.tasks.task import Evaluation, Prepared, Task, scoring_of, task_of

pytestmark = pytest.mark.usefixtures("_no_pictures")
logger = logging.getLogger("fastdml.labels")
LABELS = ("left", "top")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsConfig(TrainConfig):
    data: str = "corners"
    """Data set: corners."""
    symmetric: bool = False
    """Peers learn from each other by the symmetric divergence."""
    epochs: int = 3
    """Passes over the training images."""

    limits: ClassVar = TrainConfig.limits


@dataclasses.dataclass(frozen=True)
class LabelsScores:
    rows: int
    all_right: list[float]
    each_right: list[float]
    ensemble_all_right: float
    ensemble_each_right: float


SCORING = Scoring(
    LabelsScores,
    (
        Headline("all_right", label="all labels", entry="all", title="all labels right"),
        Headline("each_right", label="a label", entry="each", title="a label right"),
    ),
    ensemble="the peers' mean probabilities",
)


def corners(n: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    images = torch.randint(0, 100, (n, 1, 8, 8), generator=generator)
    images[labels % 2 == 1, :, :, :4] += 70
    images[labels >= 2, :, :4] += 70
    names = ("none", "left", "top", "both")
    return ImageSet(images.to(torch.uint8), labels, 4, names, (100.0,), (60.0,))


def load_corners() -> tuple[ImageSet, ImageSet]:
    return corners(48, 0), corners(32, 1)


class Labels(Task):
    name, title, settings, scoring = "labels", "several labels", LabelsConfig, SCORING
    options: ClassVar = {"--label": {"choices": LABELS, "help": "score one label alone"}}

    @contextmanager
    def prepare(self, config, device, hint=HINT):
        train, test = load_corners()
        logger.info("corners are drawn")
        cohort = Cohort(config.peers, 4, in_channels=1, seed=config.seed, image_size=(8, 8))
        yield Prepared(
            cohort.to(device),
            ResidentLoader(train, config.batch_size, seed=config.seed, train=True, pad=0),
            ResidentLoader(test, 32, train=False),
        )

    def mutual_loss(self, config, K, **options):
        return super().mutual_loss(config, K, symmetric=config.symmetric, **options)

    def score(self, cohort, test, amp):
        right = [[] for _ in range(len(cohort) + 1)]
        for images, labels in test.epoch(0):
            with torch.inference_mode(), amp.autocast():
                p = [z.float().softmax(1) for z in cohort(images)]
            wanted = torch.stack([labels % 2, labels // 2], 1)
            for found, q in zip(right, [*p, sum(p) / len(p)], strict=True):
                said = q.argmax(1)
                found.append(torch.stack([said % 2, said // 2], 1) == wanted)
        right = [torch.cat(found) for found in right]
        every = [found.all(1).float().mean().item() for found in right]
        each = [found.float().mean().item() for found in right]
        return LabelsScores(len(right[0]), every[:-1], each[:-1], every[-1], each[-1])

    def evaluate(self, cohort, config, device, options, *, run, hint=HINT):
        test = as_batches(ResidentLoader(load_corners()[1], 32, train=False), device, 4, "test")
        with evaluating(cohort):
            scores = self.score(cohort, test, fastdml.engine.Amp(device, None, None))
        rows = [
            ("peer", "all right"),
            *((n, f"{x:.3f}") for n, x in zip(cohort.names, scores.all_right, strict=True)),
        ]
        logger.info("scored on %s", options["label"] or "all labels")
        return Evaluation(dataclasses.asdict(scores), fixed_columns(rows))


@pytest.fixture
def third(monkeypatch):
    """The task and its data set, registered for the time of a test."""
    monkeypatch.setattr(tasks, "TASKS", [*tasks.TASKS])
    registry.catalogue()
    monkeypatch.setattr(registry, "_KNOWN", {**registry._KNOWN})
    register_dataset(
        "corners", task="labels", image_shape=(1, 8, 8), classes=("none", "left", "top", "both"),
        mean=(100.0,), std=(60.0,), purpose="tests", files="none",
    )(load_corners)  # fmt: skip
    tasks.register_task(Labels)
    return tasks.TASKS[-1]


OPTIONS = [
    "--peers", "resnet8", "resnet8", "--batch-size", "16", "--amp", "off", "--execution", "eager",
    "--threads", "1", "--device", "cpu", "--no-tensorboard", "--symmetric",
]  # fmt: skip


@pytest.fixture
def train(third, tmp_path):
    def command(*options: str) -> int:
        return cli.main(["train", "corners", *OPTIONS, *options])

    return command


def test_the_command_trains_it_and_its_scores_lead(train, tmp_path, capfd):
    folder = tmp_path / "run"
    assert train("--folder", str(folder), "--independent") == 0
    out, err = capfd.readouterr()
    assert "corners are drawn" in err
    assert re.search(r"mutual epoch 3/3 .* test all labels % [\d. ]+ ensemble [\d.]+", err)
    header, _, *peers, note, _ = [line for line in out.splitlines() if line]
    assert re.split(r"  +", header) == [
        "peer", "parameters", "all labels independent %", "all labels mutual %",
        "a label independent %", "a label mutual %", "all labels ensemble %", "images/s",
    ]  # fmt: skip
    assert len(peers) == 2
    assert note.startswith("ensemble: the peers' mean probabilities")
    summary = json.loads((folder / "summary.json").read_text())
    scores = LabelsScores(**summary["mutual"]["scores"])
    assert [peer["all_mutual"] for peer in summary["peers"]] == scores.all_right
    assert [peer["each_mutual"] for peer in summary["peers"]] == scores.each_right
    assert summary["ensemble_mutual"] == scores.ensemble_all_right
    assert all(0 <= peer["all_independent"] <= 1 for peer in summary["peers"])
    tests = [record for record in logged(folder) if record["kind"] == "test"]
    assert tests[-1]["all_right"] == scores.all_right
    best = max(tests, key=lambda test: sum(test["all_right"]))
    assert summary["mutual"]["best_epoch"] == best["epoch"]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["data"], settings["symmetric"]) == ("corners", True)
    assert isinstance(load_config(folder / "config.yaml"), LabelsConfig)


def test_a_resumed_run_ends_as_one_that_went_through(train, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train("--folder", str(whole)) == 0
    assert train("--folder", str(parts), "--epochs", "1") == 0
    assert train("--folder", str(parts), "--resume", "--epochs", "3") == 0
    assert logged(parts) == logged(whole)
    assert same_weights(Cohort.load(parts), Cohort.load(whole))
    a, b = (json.loads((f / "summary.json").read_text())["mutual"] for f in (parts, whole))
    assert (a["scores"], a["best_scores"]) == (b["scores"], b["best_scores"])


def test_the_command_evaluates_it(train, tmp_path, capfd):
    folder = str(tmp_path / "run")
    assert train("--folder", folder, "--epochs", "1") == 0
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["mutual"]["scores"]
    capfd.readouterr()
    assert cli.main(["evaluate", folder, "--json", "--label", "top"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["scores"] == trained
    assert "scored on top" in err
    assert cli.main(["evaluate", folder]) == 0
    assert re.match(r"peer +all right\n-+\nresnet8-1 +[\d.]+\n", capfd.readouterr().out)
    assert cli.main(["evaluate", folder, "--no-rerank"]) == 2
    said = f"--no-rerank is for runs on market1501; {folder} is on corners"
    assert said in capfd.readouterr().err


def test_the_command_names_it(third, capfd):
    assert cli.main(["train"]) == 0
    assert "corners" in capfd.readouterr().out
    assert cli.main(["train", "corner"]) == 2
    assert "did you mean corners?" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    assert re.search(r"several labels runs only:\n +--label", capfd.readouterr().out)


def test_from_python_with_own_data(third, tmp_path):
    config = LabelsConfig(
        peers=["resnet8"] * 2, batch_size=16, epochs=1, folder=str(tmp_path / "run"), amp="off",
        execution="eager", threads=1, device="cpu", tensorboard=False, symmetric=True,
    )  # fmt: skip
    train, test = (
        ResidentLoader(s, 16, train=t) for s, t in zip(load_corners(), (True, False), strict=True)
    )
    result = fit(Cohort(["resnet8"] * 2, 4, in_channels=1), train, test, config)
    assert isinstance(result.scores, LabelsScores)
    assert re.search(r"all labels % +a label %\n", str(result))
    assert config.data == "corners"
    kept = load_config(result.folder / "config.yaml")
    assert kept.data.startswith("own data: 3 batches of 16")
    assert (type(kept), kept.symmetric) == (LabelsConfig, True)
    assert run(config.replace(folder=str(tmp_path / "again"), dry_run=True)) is None


def test_tasks_are_found_by_settings_and_by_data(third):
    assert task_of(LabelsConfig()) is third
    assert task_of(TrainConfig()).name == "classification"
    assert task_of(ReidConfig()).name == "reid"
    assert third.data == ("corners",)
    assert type(preset("corners")) is LabelsConfig
    assert type(preset("my own", symmetric=True)) is LabelsConfig
    assert type(preset("my own")) is TrainConfig
    scores = LabelsScores(3, [0.5, 1.0], [0.5, 1.0], 0.5, 1.0)
    assert scoring_of(scores) is SCORING
    assert SCORING.read(dataclasses.asdict(scores)) == scores
    assert SCORING.mean(scores) == 0.75
    with pytest.raises(TypeError):
        SCORING.read({"all_right": [1.0]})


def test_what_cannot_be_a_task(third):
    with pytest.raises(
        ValueError, match="the name 'labels' of Again is that of Labels: give another"
    ):
        tasks.register_task(type("Again", (Labels,), {}))
    with pytest.raises(ValueError, match="the settings LabelsConfig of More are those of Labels"):
        tasks.register_task(type("More", (Labels,), {"name": "more"}))
    register_dataset(
        "waves",
        task="sound",
        image_shape=(1, 8, 8),
        classes=("a",),
        mean=(1.0,),
        std=(1.0,),
        purpose="tests",
    )(load_corners)
    with pytest.raises(InputError, match="nothing trains on waves: no task is called 'sound'"):
        preset("waves")


def test_no_other_file_knows_which_tasks_there_are():
    """Settings, scores and data sets of re-identification are named in its own files, in those of
    its data and metrics, and where they are public."""
    own = ("train/tasks/re", "train/config/reid.py", "train/config/types.py", "train/__init__.py")
    own += ("data/", "metrics/")
    words = {"ReidConfig", "RetrievalScores", "mAP", "rank1", "market1501", "standin", "recipe"}
    root = Path(fastdml.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(own):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = {getattr(n, "id", None) or getattr(n, "attr", None) for n in nodes}
        used |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        if used & words:
            found[name] = used & words
    assert found == {}
