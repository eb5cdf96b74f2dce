"""A third task, defined in this file alone: several labels an image, each right or wrong.

Each picture is bright or not on its left and at its top. Labels, loss and scores are of another
kind than those of classification, and nothing but the task's and the data set's registration makes
them known to training, reports and commands.
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
from torch.nn import functional as F

import fastdml
from fastdml import cli
from fastdml.cli.evaluate import evaluate
from fastdml.cohort import Cohort
from fastdml.data import HINT, register_dataset, registry
from fastdml.engine import Amp
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats
from fastdml.report.scoring import Headline, Scoring
from fastdml.report.tables import fixed_columns
from fastdml.train import ReidConfig, TrainConfig, fit, load_config, run
from fastdml.train.config.sources import preset
from fastdml.train.tasks import Evaluation, Prepared, Task
from fastdml.train.tasks import task as tasks
from fastdml.train.tasks.task import scoring_of, task_of

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


class Corners:
    """Batches of noise, brighter on the left or at the top or both; labels (N, 2), each 0 or 1."""

    num_classes, class_names = 2, LABELS

    def __init__(self, n: int, batch_size: int, seed: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (n, 2), generator=generator).float().to(device)
        self.images = torch.randn(n, 1, 8, 8, generator=generator).to(device)
        self.images[:, :, :, :4] += self.labels[:, 0, None, None, None]
        self.images[:, :, :4] += self.labels[:, 1, None, None, None]
        self.batch_size, self.seed = batch_size, seed

    def __len__(self):
        return len(self.labels) // self.batch_size

    def epoch(self, epoch, start=0):
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        for rows in order.split(self.batch_size)[start : len(self)]:
            yield self.images[rows], self.labels[rows]


class LabelsLoss(MutualLoss):
    """Binary cross-entropy of each label, and the divergence of each label's two probabilities."""

    def __init__(self, symmetric: bool, **options) -> None:
        super().__init__(**options)
        self.both_ways = symmetric

    def value_and_grad(self, logits, labels):
        K = range(len(logits))
        z = [x.detach().float().requires_grad_() for x in logits]
        with torch.enable_grad():
            ce = [F.binary_cross_entropy_with_logits(x, labels) for x in z]
            pairs = torch.stack([torch.stack([self.divergence(z[t], z[s]) for s in K]) for t in K])
            kl = pairs.sum(0) / max(len(z) - 1, 1)
            losses = self.ce_weight * torch.stack(ce) + self.kl_weight * kl
            grads = torch.autograd.grad(losses.sum(), z)
        p = torch.stack([x.detach().sigmoid() for x in z])
        right, together = ((q > 0.5) == (labels > 0.5) for q in (p, p.mean(0)))
        hits = right.all(2).sum(1), together.all(1).sum()
        found = torch.stack(ce), kl, pairs, p.mean((1, 2)), *hits
        stats = MutualStats(*(value.detach().float() for value in found))
        return losses.detach(), stats, [g.to(x.dtype) for g, x in zip(grads, logits, strict=True)]

    def divergence(self, teacher, student):
        def kl(a, b):
            p, q = F.logsigmoid, a.sigmoid()
            return (q * (p(a) - p(b)) + (1 - q) * (p(-a) - p(-b))).mean()

        teacher = teacher.detach()
        one = kl(teacher, student)
        return (one + kl(student, teacher)) / 2 if self.both_ways else one


class Labels(Task):
    name, title, settings, scoring = "labels", "several labels", LabelsConfig, SCORING
    options: ClassVar = {"--label": {"choices": LABELS, "help": "score one label alone"}}

    @contextmanager
    def prepare(self, config, device, hint=HINT):
        logger.info("corners are drawn")
        cohort = Cohort(config.peers, 2, in_channels=1, seed=config.seed, image_size=(8, 8))
        yield Prepared(
            cohort.to(device),
            Corners(48, config.batch_size, config.seed, device),
            Corners(32, 16, config.seed + 1, device),
        )

    def check_labels(self, labels, images, num_classes, where, values):
        if labels.shape != (len(images), num_classes) or not labels.is_floating_point():
            raise InputError(f"{where}: labels are {labels.dtype}: give 0.0 or 1.0 for each")

    def mutual_loss(self, config, K, **options):
        weights = {"ce_weight": config.ce_weight, "kl_weight": config.kl_weight}
        return LabelsLoss(config.symmetric, **weights, **options)

    def score(self, cohort, test, amp):
        right = [[] for _ in range(len(cohort) + 1)]
        for images, labels in test.epoch(0):
            with torch.inference_mode(), amp.autocast():
                p = [z.float().sigmoid() for z in cohort(images)]
            for found, q in zip(right, [*p, sum(p) / len(p)], strict=True):
                found.append((q > 0.5) == (labels > 0.5))
        right = [torch.cat(found) for found in right]
        every = [found.all(1).float().mean().item() for found in right]
        each = [found.float().mean().item() for found in right]
        return LabelsScores(len(right[0]), every[:-1], each[:-1], every[-1], each[-1])

    def evaluate(self, cohort, config, device, options, *, run, hint=HINT):
        with evaluating(cohort):
            test = Corners(32, 16, config.seed + 1, device)
            scores = self.score(cohort, test, Amp(device, None, None))
        logger.info("scored on %s", options["label"] or "all labels")
        right = [f"{x:.3f}" for x in scores.all_right]
        rows = [("peer", "all right"), *zip(cohort.names, right, strict=True)]
        return Evaluation(dataclasses.asdict(scores), fixed_columns(rows))


@pytest.fixture
def third(monkeypatch):
    """The task and its data set, registered for the time of a test."""
    monkeypatch.setattr(tasks, "TASKS", [*tasks.TASKS])
    registry.catalogue()
    monkeypatch.setattr(registry, "_KNOWN", {**registry._KNOWN})
    register_dataset(
        "corners", task="labels", image_shape=(1, 8, 8), classes=LABELS, mean=(0.0,), std=(1.0,),
        purpose="tests", files="none",
    )(Corners)  # fmt: skip
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
    assert re.search(r"mutual epoch 3/3 .* test all labels [\d. ]+ ens [\d.]+", err)
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
    said = (
        rf"--no-rerank is for runs on [\w ]*\bmarket1501\b[\w ]*; {re.escape(folder)} is on corners"
    )
    assert re.search(said, capfd.readouterr().err)


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
    train, test = Corners(48, 16, 0), [*Corners(32, 16, 1).epoch(0)]
    cohort = Cohort(["resnet8"] * 2, 2, in_channels=1)
    result = fit(cohort, train, test, config)
    assert isinstance(result.scores, LabelsScores)
    assert re.search(r"all labels % +a label %\n", str(result))
    assert config.data == "corners"
    kept = load_config(result.folder / "config.yaml")
    assert kept.data.startswith("own data: 3 batches of 16")
    assert (type(kept), kept.symmetric) == (LabelsConfig, True)
    assert run(config.replace(folder=str(tmp_path / "again"), dry_run=True)) is None
    wrong = [(images, labels.long()) for images, labels in test]
    with pytest.raises(InputError, match=r"test batch 0: labels are torch\.int64: give 0"):
        fit(cohort, train, wrong, config.replace(folder=str(tmp_path / "wrong")))
    with pytest.raises(InputError, match="training batch 0: labels are float32 of shape"):
        fit(cohort, train, test, TrainConfig(folder=str(tmp_path / "classes"), amp="off"))


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
    )(Corners)
    with pytest.raises(InputError, match="nothing trains on waves: no task is called 'sound'"):
        preset("waves")


def test_no_other_file_knows_which_tasks_there_are():
    """Settings, scores and data sets of re-identification are named in its own files, in those of
    its data and metrics, where they are public, and in the experiments that repeat it."""
    own = ("train/tasks/re", "train/config/reid.py", "train/config/types.py", "train/__init__.py")
    own += ("data/", "metrics/", "reproduce/")
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
