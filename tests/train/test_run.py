"""Training runs: what they leave, how they stop, and that they go on as if nothing had been."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import Crash, CrashingLoader, environment, logged, same_weights, timeless
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import files
from fastdml import train as training
from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader, TorchLoader
from fastdml.data.loaders import make
from fastdml.engine import Amp
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.metrics import ClassificationScores
from fastdml.report import metrics_log
from fastdml.report.metrics_log import read_metrics
from fastdml.train import (
    TrainConfig,
    TrainingDiverged,
    TrainingStopped,
    checkpoint,
    fit,
)
from fastdml.train.batches import as_batches
from fastdml.train.tasks import classification

pytestmark = pytest.mark.usefixtures("_no_pictures")  # a test that wants them calls undo
# The cohort and the data are so small that a whole run takes a fraction of a second.
CLASSES, SIDE = 4, 6
CPU = torch.device("cpu")
# What `fit` records of these loaders and peers.
OWN = {
    "data": f"own data: 6 batches of 16, images 1x{SIDE}x{SIDE}",
    "peers": ("TinyPeer", "TinyPeer"),
    "pad": 1,
    "flip": False,
}


class TinyPeer(nn.Module):
    """Convolution, BatchNorm and dropout: everything with a state of its own."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.num_classes = CLASSES
            self.conv = nn.Conv2d(1, width, 3)
            self.norm = nn.BatchNorm2d(width)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def make_cohort(seed: int = 0, widths=(4, 7)) -> Cohort:
    return Cohort([TinyPeer(w, seed + 10 * k) for k, w in enumerate(widths)], CLASSES)


def make_images(n: int, seed: int) -> ImageSet:
    """Class c is bright in quadrant c."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    images = torch.randint(0, 160, (n, 1, SIDE, SIDE), generator=generator)
    half = SIDE // 2
    for c in range(CLASSES):
        rows, columns = half * (c // 2), half * (c % 2)
        images[labels == c, :, rows : rows + half, columns : columns + half] += 90
    names = tuple("abcd")
    return ImageSet(images.to(torch.uint8), labels, CLASSES, names, (100.0,), (60.0,))


def make_loaders(batch_size: int = 16) -> tuple[ResidentLoader, ResidentLoader]:
    """Six steps an epoch."""
    train = ResidentLoader(make_images(100, 1), batch_size, train=True, pad=1, flip=False)
    return train, ResidentLoader(make_images(50, 2), 20, train=False)


@pytest.fixture
def settings(tmp_path):
    """Makes settings for a run in the test's own folder."""

    def make(**changes) -> TrainConfig:
        values = {
            "folder": str(tmp_path / "run"),
            "batch_size": 16,
            "epochs": 3,
            "log_every": 4,
            "amp": "off",
            "device": "cpu",
            "execution": "eager",
            "threads": 1,
            "tensorboard": False,
        }
        return TrainConfig(**{**values, **changes})

    return make


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class TestRunFolder:
    def test_holds_everything_and_the_cohort_learns(self, settings, monkeypatch):
        monkeypatch.undo()
        cohort = make_cohort()
        train, test = make_loaders()
        result = fit(cohort, train, test, settings(epochs=12, tensorboard=True))
        folder = result.folder
        names = {p.name for p in folder.iterdir()}
        assert names == {
            ".lock", "best", "cohort.json", "config.yaml", "curves.png", "last.ckpt",
            "metrics.jsonl", "pairwise_kl.png", "peers", "summary.json", "tensorboard",
        }  # fmt: skip
        assert min(result.scores.top1) > 0.6
        assert result.parameters == tuple(
            sum(w.numel() for w in p.parameters()) for p in cohort.peers
        )
        assert len(result.history) == 12
        assert [r["step"] for r in result.history] == [6 * e for e in range(1, 13)]
        assert result.history[-1]["loss"][0] < result.history[0]["loss"][0]
        assert (result.independent, result.skipped_steps, result.precision) == (None, 0, "fp32")
        assert result.images_per_second > 0
        assert 0 < result.data_wait < 1

        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved == settings(epochs=12, tensorboard=True, **OWN).to_dict()
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["mutual"]["scores"]["top1"] == result.scores.top1
        assert summary["mutual"]["weights"] == {"last": str(folder), "best": str(folder / "best")}
        assert summary["independent"] is None

    def test_metrics_are_those_of_the_right_peer(self, settings):
        """A large peer that learns beside one that can't; every figure follows its peer."""
        for order in (0, 1):
            cohort = make_cohort(widths=(3, 9)[:: 1 - 2 * order])
            with torch.no_grad():
                cohort.peers[order].head.weight.mul_(50)
            cohort.peers[order].requires_grad_(False)
            train, test = make_loaders()
            folder = settings().folder + str(order)
            result = fit(cohort, train, test, settings(folder=folder))
            for record in (r for r in read_metrics(folder) if r["kind"] in ("train", "epoch")):
                assert record["ce"][order] > 2 * record["ce"][1 - order]
            assert result.scores.nll[order] > result.scores.nll[1 - order]

    def test_existing_folders_are_not_touched(self, settings, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        with pytest.raises(InputError, match="run is there already and is not overwritten"):
            fit(make_cohort(), *make_loaders(), settings())
        with pytest.raises(InputError, match="is there already"):
            fit(make_cohort(), *make_loaders(), settings(dry_run=True))
        assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
        with pytest.raises(InputError, match="is there already"):
            fit(make_cohort(), *make_loaders(), settings(folder=str(folder / "thesis.txt")))
        with pytest.raises(InputError, match="cannot make the run's folder"):
            fit(make_cohort(), *make_loaders(), settings(folder=str(folder / "thesis.txt/run")))

    def test_one_process_at_a_time(self, settings):
        first = fit(make_cohort(), *make_loaders(), settings())
        script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
        with subprocess.Popen(
            [sys.executable, "-c", f"{script}; print(); sys.stdout.flush(); sys.stdin.read()",
             first.folder / ".lock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:  # fmt: skip
            other.stdout.readline()
            before = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
            with pytest.raises(InputError, match=r"another process is training in .*run: wait"):
                fit(make_cohort(), *make_loaders(), settings(resume=True, epochs=4))
            assert {p: p.stat().st_mtime_ns for p in first.folder.iterdir()} == before
            other.stdin.close()
        longer = fit(make_cohort(), *make_loaders(), settings(resume=True, epochs=4))
        assert longer.history[-1]["epoch"] == 4

    def test_a_full_disk(self, settings):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(
                InputError, match=r"cannot write .*run/config\.yaml: File too large: make"
            ):
                fit(make_cohort(), *make_loaders(), settings())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_peers_that_do_not_fit_make_no_folder(self, settings):
        other = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES + 1))
        other.num_classes = CLASSES  # so it says
        cohort = Cohort([TinyPeer(4, 0), other], CLASSES)
        with pytest.raises(InputError, match=r"peer Sequential must return logits \(N, 4\)"):
            fit(cohort, *make_loaders(), settings())
        assert not Path(settings().folder).exists()

    def test_numbered_folders(self, settings, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = settings(folder=None, epochs=1, data="mine")
        folders = [fit(make_cohort(), *make_loaders(), config).folder for _ in range(2)]
        assert [str(f) for f in folders] == [
            "runs/mine-TinyPeer-TinyPeer-001",
            "runs/mine-TinyPeer-TinyPeer-002",
        ]

    def test_best_weights_are_those_of_the_best_epoch(self, settings):
        scripted = iter([0.2, 0.9, 0.5])
        seen = []

        def evaluate(cohort):
            assert not any(m.training for m in cohort.modules())
            seen.append({k: v.clone() for k, v in cohort.state_dict().items()})
            x = next(scripted)
            values = {f.name: [x, x] for f in dataclasses.fields(ClassificationScores)}
            values |= {k: x for k in values if k.startswith("ensemble")}
            return ClassificationScores(**{**values, "rows": 9, "nonfinite": [0, 0]})

        cohort = make_cohort()
        result = fit(cohort, make_loaders()[0], evaluate, settings())
        assert result.best_epoch == 2
        assert (result.best_scores.top1, result.scores.top1) == ([0.9, 0.9], [0.5, 0.5])
        for name, state in (("best", seen[1]), ("last", seen[2])):
            loaded = Cohort.load(result.weights[name], peers=list(make_cohort(99).peers))
            for key, value in loaded.state_dict().items():
                assert torch.equal(value, state[key])
        assert same_weights(cohort, Cohort.load(result.folder, peers=list(make_cohort(9).peers)))
        assert all(m.training for m in cohort.modules())

    def test_evaluations_every_few_epochs_and_at_the_end(self, settings):
        fit(make_cohort(), *make_loaders(), settings(epochs=5, eval_every=2))
        at = [r["epoch"] for r in read_metrics(settings().folder) if r["kind"] == "test"]
        assert at == [2, 4, 5]

    @pytest.mark.parametrize("iterations", [4, 6, 13, 17])
    def test_a_run_of_iterations_is_tested_where_its_training_ends(self, settings, iterations):
        config = settings(epochs=0, iterations=iterations)
        result = fit(make_cohort(), *make_loaders(), config)
        for kind in ("test", "epoch"):
            record = [r for r in read_metrics(result.folder) if r["kind"] == kind][-1]
            assert (record["step"], record["epoch"]) == (iterations, iterations / 6)
        assert result.history[-1]["epoch"] == iterations / 6
        assert all(6 * r["epoch"] == r["step"] for r in read_metrics(result.folder) if r["step"])
        longer = fit(make_cohort(), *make_loaders(), config.replace(resume=True, iterations=23))
        assert [r["step"] for r in longer.history][-2:] == [18, 23]

    def test_without_evaluation(self, settings):
        result = fit(make_cohort(), make_loaders()[0], None, settings())
        assert (result.scores, result.best_epoch, list(result.weights)) == (None, 0, ["last"])

    def test_batch_statistics_are_kept_up_after_an_evaluation(self, settings):
        cohort = make_cohort()
        fit(cohort, *make_loaders(), settings(epochs=3))
        assert cohort.peers[0].norm.num_batches_tracked == 18

    def test_plain_iterables_of_batches(self, settings):
        images = make_images(64, 1)
        data = TensorDataset(images.images.float() / 255, images.labels)
        loader = DataLoader(data, batch_size=16)
        result = fit(make_cohort(), loader, loader, settings(epochs=2))
        assert result.scores.rows == 64
        assert result.history[-1]["step"] == 8
        with pytest.raises(InputError, match="a generator is not"):
            fit(make_cohort(), (x for x in loader), None, settings(folder="unused"))
        with pytest.raises(InputError, match="not one training batch"):
            fit(make_cohort(), [], None, settings(folder="unused"))


class TestReproducible:
    def test_twice_the_same_and_the_callers_generator_untouched(self, settings, tmp_path):
        runs = []
        for name in ("a", "b"):
            torch.manual_seed(len(runs))  # must not matter
            before = torch.get_rng_state()
            cohort = make_cohort()
            fit(cohort, *make_loaders(), settings(folder=str(tmp_path / name)))
            assert torch.equal(torch.get_rng_state(), before)
            runs.append(cohort)
        assert same_weights(*runs)
        assert logged(tmp_path / "a") == logged(tmp_path / "b")

    def test_the_seed_matters(self, settings, tmp_path):
        cohorts = [make_cohort(), make_cohort()]
        for seed, cohort in enumerate(cohorts):  # seeds the dropout
            folder = str(tmp_path / f"{seed}")
            fit(cohort, *make_loaders(), settings(folder=folder, seed=seed))
        assert not same_weights(*cohorts)

    def test_deterministic_mode_ends_with_the_run(self, settings):
        seen = []

        def evaluate(cohort):
            seen.append(torch.are_deterministic_algorithms_enabled())
            raise Crash

        with pytest.raises(Crash):
            fit(make_cohort(), make_loaders()[0], evaluate, settings(deterministic=True))
        assert seen == [True]
        assert not torch.are_deterministic_algorithms_enabled()


class TestResume:
    @pytest.mark.parametrize(
        ("at", "update"),
        [
            *[(at, "simultaneous") for at in (0, 1, 3, 5, 6, 8, 17)],
            *[(at, "sequential") for at in (5, 9)],
        ],
    )
    def test_a_crash_leaves_no_trace(self, settings, tmp_path, at, update):
        whole = make_cohort()
        options = {"update": update, "save_every_steps": 2, "warmup_epochs": 1.5}
        unbroken = fit(whole, *make_loaders(), settings(**options))

        config = settings(**options, folder=str(tmp_path / "broken"))
        train, test = make_loaders()
        with pytest.raises(Crash):
            fit(make_cohort(), CrashingLoader(train, at), test, config)
        torch.rand(at)  # whatever the process drew
        again = make_cohort()
        resumed = fit(again, *make_loaders(), config.replace(resume=True))
        assert same_weights(again, whole)
        assert logged(resumed.folder) == logged(unbroken.folder)
        assert resumed.scores == unbroken.scores
        assert timeless(resumed.history) == timeless(unbroken.history)

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_in_half_precision_too(self, settings, tmp_path, amp, optimizer):
        options = {"amp": amp, "optimizer": optimizer, "lr": 0.01, "save_every_steps": 1}
        whole, again = make_cohort(), make_cohort()
        unbroken = fit(whole, *make_loaders(), settings(**options))
        assert unbroken.precision == amp
        config = settings(**options, folder=str(tmp_path / "broken"))
        train, test = make_loaders()
        with pytest.raises(Crash):
            fit(make_cohort(), CrashingLoader(train, 8), test, config)
        fit(again, *make_loaders(), config.replace(resume=True))
        assert same_weights(again, whole)

    @pytest.mark.parametrize("kind", ["torch", "DataLoader"])
    def test_what_peers_draw_goes_on_where_it_was(self, settings, tmp_path, kind):
        """Starting to read again, and reading what is done already, may draw numbers too."""
        images = make_images(100, 1)

        def loader():
            if kind == "torch":
                return TorchLoader(images, 16, train=True, pad=1, flip=False, workers=0)
            data = TensorDataset(images.images.float() / 255, images.labels)
            return DataLoader(data, batch_size=16, drop_last=True)

        whole, again = make_cohort(), make_cohort()
        fit(whole, loader(), None, settings())
        config = settings(folder=str(tmp_path / "broken"), save_every_steps=1)
        with pytest.raises(Crash):
            fit(make_cohort(), CrashingLoader(as_batches(loader(), CPU, CLASSES), 9), None, config)
        fit(again, loader(), None, config.replace(resume=True))
        assert same_weights(again, whole)

    def test_a_finished_run_is_only_summed_up_again(self, settings):
        first = fit(make_cohort(), *make_loaders(), settings())
        stamp = (first.folder / "last.ckpt").stat().st_mtime_ns
        again = make_cohort(seed=5)
        second = fit(again, *make_loaders(), settings(resume=True))
        assert second.scores == first.scores
        assert second.history == first.history
        assert (first.folder / "last.ckpt").stat().st_mtime_ns == stamp

    def test_a_longer_run_equals_one_that_was_longer_from_the_start(self, settings, tmp_path):
        whole, longer = make_cohort(), make_cohort()
        fit(whole, *make_loaders(), settings(epochs=4, lr_drop_every=3))
        config = settings(epochs=2, lr_drop_every=3, folder=str(tmp_path / "longer"))
        fit(make_cohort(), *make_loaders(), config)
        fit(longer, *make_loaders(), config.replace(epochs=4, resume=True))
        assert same_weights(whole, longer)
        assert yaml.safe_load((tmp_path / "longer/config.yaml").read_text())["epochs"] == 4
        with pytest.raises(InputError, match="the run has done 4 epochs, more than epochs=3"):
            fit(make_cohort(), *make_loaders(), config.replace(epochs=3, resume=True))

    def test_changes_that_matter_are_refused(self, settings):
        fit(make_cohort(), *make_loaders(), settings())
        for changes, message in (
            ({"lr": 0.2}, r"cannot resume: lr was 0\.1 and is now 0\.2"),
            ({"amp": "bf16"}, r"the precision \(set amp\) was fp32 and is now bf16"),
        ):
            with pytest.raises(InputError, match=message):
                fit(make_cohort(), *make_loaders(), settings(resume=True, **changes))
        with pytest.raises(
            InputError, match=r"data was 'own data: 6 batches of 16, .* now 'own data: 12"
        ):
            fit(make_cohort(), *make_loaders(8), settings(resume=True))
        with pytest.raises(InputError, match=r"was written for other peers: .*size mismatch"):
            fit(make_cohort(widths=(4, 8)), *make_loaders(), settings(resume=True))
        with pytest.raises(InputError, match=r"peers was .* and is now"):
            fit(make_cohort(widths=(4, 7, 8)), *make_loaders(), settings(resume=True))

    def test_a_damaged_checkpoint_is_named(self, settings):
        result = fit(make_cohort(), *make_loaders(), settings())
        path = result.folder / "last.ckpt"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"last\.ckpt is not a checkpoint that can be read"):
            fit(make_cohort(), *make_loaders(), settings(resume=True))

    @pytest.mark.parametrize("at", [4, 10])
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_saves_and_says_so(self, settings, tmp_path, at, number):
        whole, again = make_cohort(), make_cohort()
        fit(whole, *make_loaders(), settings())
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        config = settings(folder=str(tmp_path / "stopped"))
        train, test = make_loaders()
        loader = CrashingLoader(train, at, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingStopped) as stopped:
            fit(make_cohort(), loader, test, config)
        assert stopped.value.code == 128 + number
        assert signal.Signals(number).name in str(stopped.value)
        assert f"in epoch {at // 6 + 1}, after {at % 6 + 1} of 6 steps" in str(stopped.value)
        assert checkpoint.load(tmp_path / "stopped/last.ckpt")["position"] == at + 1
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        fit(again, *make_loaders(), config.replace(resume=True))
        assert same_weights(whole, again)
        assert logged(tmp_path / "stopped") == logged(tmp_path / "run")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_that_is_ignored_stays_ignored(self, settings, number):
        """As SIGHUP under nohup, and SIGINT of what a script runs in the background."""
        train, test = make_loaders()
        before = signal.signal(number, signal.SIG_IGN)
        try:
            loader = CrashingLoader(train, 4, lambda: os.kill(os.getpid(), number))
            result = fit(make_cohort(), loader, test, settings())
            assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)
        assert result.history[-1]["epoch"] == 3

    def test_a_signal_in_the_last_step_of_an_epoch(self, settings, tmp_path):
        train, test = make_loaders()
        config = settings()
        with pytest.raises(TrainingStopped, match="in epoch 2, after 0 of 6 steps"):
            fit(make_cohort(), CrashingLoader(train, 5, terminate), test, config)
        again, whole = make_cohort(), make_cohort()
        fit(again, *make_loaders(), config.replace(resume=True))
        fit(whole, *make_loaders(), settings(folder=str(tmp_path / "whole")))
        assert same_weights(whole, again)
        assert logged(tmp_path / "whole") == logged(tmp_path / "run")


class TestUnfinishedFolders:
    """What a folder may hold where there is no checkpoint to go on from."""

    RESULTS = ("metrics.jsonl", "cohort.json", "summary.json", "curves.png", "notes.txt")

    def finished(self, settings) -> Path:
        return fit(make_cohort(), *make_loaders(), settings(independent=True, epochs=1)).folder

    def refused(self, settings, *patterns: str) -> None:
        """Resuming changes nothing, and says why in one line; a dry run says it too."""
        folder = Path(settings().folder)

        def state():
            return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}

        before = state()
        for dry in (True, False):
            config = settings(independent=True, epochs=1, resume=True, dry_run=dry)
            with pytest.raises(InputError) as error:
                fit(make_cohort(), *make_loaders(), config)
            assert "\n" not in str(error.value)
            for pattern in patterns:
                assert pattern in str(error.value)
        assert state() == before

    @pytest.mark.parametrize("phase", ["", "independent"])
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda path: path.unlink(), "last.ckpt is missing"),
            (
                lambda path: (path.unlink(), path.symlink_to("gone")),
                "last.ckpt is a link to nothing",
            ),
            (lambda path: (path.unlink(), path.mkdir()), "last.ckpt is a directory"),
            (lambda path: (path.unlink(), os.mkfifo(path)), "last.ckpt is not a file"),
        ],
        ids=["missing", "link", "directory", "pipe"],
    )
    def test_a_lost_checkpoint_costs_no_results(self, settings, phase, damage, said):
        folder = self.finished(settings) / phase
        damage(folder / "last.ckpt")
        self.refused(
            settings, f"cannot resume {folder}: {said}", "metrics.jsonl, peers", "restore last.ckpt"
        )

    @pytest.mark.parametrize("name", [*RESULTS, "best/cohort.json", "peers/00-a.safetensors"])
    def test_anything_but_an_untouched_start_is_kept(self, settings, name):
        config = settings(independent=True, epochs=1)
        path = Path(config.folder) / name
        path.parent.mkdir(parents=True)
        path.write_text("result")
        config.save(Path(config.folder) / "config.yaml")
        self.refused(settings, "last.ckpt is missing", name.partition("/")[0])

    def test_the_start_of_the_second_phase_is_not_made_up(self, settings):
        folder = self.finished(settings)
        shutil.rmtree(folder / "independent")
        (folder / "initial.ckpt").unlink()
        self.refused(settings, "initial.ckpt is missing", "restore it")
        (folder / "initial.ckpt").symlink_to("gone")
        self.refused(settings, "initial.ckpt is a link to nothing")

    def test_a_start_that_is_not_needed_any_more_is_not_asked_for(self, settings):
        first = fit(make_cohort(), *make_loaders(), settings(independent=True, epochs=1))
        (first.folder / "initial.ckpt").unlink()
        config = settings(independent=True, epochs=1, resume=True)
        again = fit(make_cohort(seed=9), *make_loaders(), config)
        assert again.scores == first.scores
        assert again.independent.scores == first.independent.scores
        assert not (first.folder / "initial.ckpt").exists()

    @pytest.mark.parametrize(
        "left",
        [
            [],
            ["initial.ckpt"],
            [".lock", ".last.ckpt.partial"],
            [".initial.ckpt.partial", ".config.yaml.partial"],
        ],
    )
    def test_a_run_killed_before_its_first_checkpoint_begins_anew(self, settings, tmp_path, left):
        whole = self.finished(settings)
        config = settings(independent=True, epochs=1, folder=str(tmp_path / "killed"))
        Path(config.folder).mkdir()
        config.save(Path(config.folder) / "config.yaml")
        for name in left:
            if name == "initial.ckpt":
                shutil.copy(whole / name, config.folder)
            else:
                (Path(config.folder) / name).write_bytes(b"half")
        fit(make_cohort(), *make_loaders(), config.replace(resume=True))
        assert logged(config.folder) == logged(whole)
        assert {p.name for p in Path(config.folder).iterdir()} == {p.name for p in whole.iterdir()}

    @pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".config.yaml.partial"]])
    def test_a_folder_killed_before_it_was_a_run_is_taken_again(self, settings, left):
        folder = Path(settings().folder)
        folder.mkdir()
        for name in left:
            (folder / name).write_text("")
        result = fit(make_cohort(), *make_loaders(), settings(epochs=1))
        assert result.folder == folder
        assert not [*folder.glob("*.partial")]

    def test_the_settings_are_there_before_anything_else(self, settings, monkeypatch):
        seen = []
        save = checkpoint.save

        def note(path, state):
            seen.append((path.name, {p.name for p in path.parent.iterdir()}))
            save(path, state)

        monkeypatch.setattr(checkpoint, "save", note)
        fit(make_cohort(), *make_loaders(), settings(independent=True, epochs=1))
        start = {"config.yaml", ".lock"}
        assert seen[0] == ("initial.ckpt", start)
        assert seen[1] == ("last.ckpt", start | {"initial.ckpt"})
        assert seen[3] == ("last.ckpt", {"config.yaml"})  # of the second phase

    def test_the_newest_run_is_meant_not_the_newest_folder(
        self, settings, tmp_path, monkeypatch, capfd
    ):
        monkeypatch.chdir(tmp_path)
        config = settings(folder=None, epochs=1, data="mine")
        fit(make_cohort(), *make_loaders(), config)
        run = "runs/mine-TinyPeer-TinyPeer"
        for number in (2, 3):
            Path(f"{run}-00{number}").mkdir()
        (tmp_path / f"{run}-003/.lock").touch()
        capfd.readouterr()
        again = fit(make_cohort(), *make_loaders(), config.replace(resume=True))
        assert str(again.folder) == f"{run}-001"
        err = capfd.readouterr().err
        assert f"passed over, without a config.yaml: {run}-003, {run}-002\n" in err
        shutil.rmtree(f"{run}-001")
        with pytest.raises(InputError, match=rf"no config\.yaml in {run}-003, runs/mine"):
            fit(make_cohort(), *make_loaders(), config.replace(resume=True))
        assert str(fit(make_cohort(), *make_loaders(), config).folder) == f"{run}-004"


class TestDamagedMetrics:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"", "does not begin with the peers' names"),
            (b"\x00\x00\x00\x00", "does not begin with the peers' names"),
            (b"[1]\n", "does not begin with the peers' names"),
            (b'{"kind": "peers", "step": 0, "names": "ab"}\n', "does not begin with"),
            (b'{"kind": "train"}\n', "does not begin with the peers' names"),
            (None, "line 2, is not a JSON object"),
            (b"\xff\xfe\n{}\n", "line 1, is not a JSON object"),
            (b"null\n", "line 2, is no log point of 2 peers"),
            (b'{"kind": "train"}\n', "line 2, is no log point of 2 peers"),
            (b'{"kind": "train", "step": 1, "epoch": 1, "ce": [1.0]}\n', "line 2, is no log point"),
            (b'{"kind": "train", "step": 1, "epoch": 1, "ce": [[1], [2]]}\n', "line 2, is no log"),
            (b'{"kind": "train", "step": 1, "epoch": 1, "ce": {}}\n', "line 2, is no log point"),
        ],
    )
    def test_is_found_before_training_goes_on(self, settings, text, said):
        config = settings(epochs=1)
        result = fit(make_cohort(), *make_loaders(), config)
        path = result.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        if text is None:
            path.write_bytes(lines[0] + lines[1].decode().encode("utf-16") + b"".join(lines[2:]))
        elif said.startswith("line 2"):
            path.write_bytes(lines[0] + text)
        else:
            path.write_bytes(text)
        stamp = (result.folder / "last.ckpt").stat().st_mtime_ns
        with pytest.raises(InputError, match=rf"metrics\.jsonl,? {said}") as error:
            fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))
        assert "\n" not in str(error.value)
        assert (result.folder / "last.ckpt").stat().st_mtime_ns == stamp
        path.unlink()  # as the message advises
        longer = fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))
        assert longer.history[-1]["epoch"] == 2

    @pytest.mark.parametrize("text", [b"", b"\xff\n{}\n", b"null\n"])
    def test_of_the_second_phase_are_looked_at_too(self, settings, text):
        config = settings(independent=True, epochs=1)
        folder = fit(make_cohort(), *make_loaders(), config).folder
        (folder / "independent" / "metrics.jsonl").write_bytes(text)
        stamp = (folder / "last.ckpt").stat().st_mtime_ns
        with pytest.raises(InputError, match=r"independent/metrics\.jsonl"):
            fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))
        assert (folder / "last.ckpt").stat().st_mtime_ns == stamp

    @pytest.mark.parametrize("kind", ["pipe", "directory"])
    def test_that_are_no_file_are_found_too(self, settings, kind):
        result = fit(make_cohort(), *make_loaders(), settings(epochs=1))
        path = result.folder / "metrics.jsonl"
        path.unlink()
        path.mkdir() if kind == "directory" else os.mkfifo(path)
        with pytest.raises(InputError, match=r"metrics\.jsonl is not a file"):
            fit(make_cohort(), *make_loaders(), settings(epochs=2, resume=True))

    def test_log_lines_are_on_disk_before_the_checkpoint_that_counts_on_them(
        self, settings, monkeypatch
    ):
        order = []
        fsync, save = os.fsync, checkpoint.save

        def note_fsync(fd):
            order.append(Path(os.path.realpath(f"/proc/self/fd/{fd}")).name)
            fsync(fd)

        def note_save(path, state):
            if state["position"]:
                order.append(("save", len(read_metrics(path.parent))))
            save(path, state)

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(checkpoint, "save", note_save)
        fit(make_cohort(), *make_loaders(), settings(epochs=2, log_every=1))
        saves = [i for i, what in enumerate(order) if isinstance(what, tuple)]
        assert [order[i][1] for i in saves] == [9, 17]  # peers; then 6 readings, epoch and test
        for i in saves:
            assert order[i - 1] == "metrics.jsonl"


def test_the_refusal_of_another_length_names_the_schedule(settings):
    config = settings(schedule="cosine", epochs=1)
    fit(make_cohort(), *make_loaders(), config)
    for changes in ({"epochs": 2}, {"epochs": 0, "iterations": 9}):
        with pytest.raises(InputError, match=r"epochs was 1 and is now . \(with schedule cosine"):
            fit(make_cohort(), *make_loaders(), config.replace(**changes, resume=True))
    with pytest.raises(InputError, match=r"schedule was 'cosine' and is now 'step'; give"):
        fit(make_cohort(), *make_loaders(), settings(epochs=2, resume=True))


class Failing:
    """`fastdml.files.create`, but files of some names cannot be written."""

    def __init__(self, name: str, error: int) -> None:
        self.name, self.error, self.create = name, error, files.create

    def __call__(self, path):
        if self.name in path.name:
            raise OSError(self.error, os.strerror(self.error))
        return self.create(path)


class TestNoRoom:
    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("curves.png", errno.ENOSPC),
            ("pairwise_kl.png", errno.EDQUOT),
            ("summary.json", errno.ENOSPC),
            ("summary.json", errno.EIO),
        ],
    )
    def test_at_the_end_is_one_line_and_the_rest_is_done_by_resuming(
        self, settings, monkeypatch, name, error
    ):
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(files, "create", Failing(name, error))
            with pytest.raises(
                InputError,
                match=rf"cannot write .*{name}: {os.strerror(error)}.*the peers are trained and "
                r"saved, resume does the rest$",
            ):
                fit(make_cohort(), *make_loaders(), settings(epochs=1))
        folder = Path(settings().folder)
        assert not (folder / name).exists()
        assert not [*folder.glob(".*.partial")]
        fit(make_cohort(), *make_loaders(), settings(epochs=1, resume=True))
        assert (folder / name).stat().st_size > 0

    def test_for_the_first_of_tensorboards_files_is_one_line(self, settings, monkeypatch):
        monkeypatch.setattr(metrics_log, "create", Failing("tfevents", errno.ENOSPC))
        with pytest.raises(InputError, match=r"cannot write .*tensorboard: No space left"):
            fit(make_cohort(), *make_loaders(), settings(tensorboard=True))

    @pytest.mark.parametrize("at", [1, 5, 100])
    def test_for_tensorboard_costs_its_events_alone(self, settings, monkeypatch, capfd, at):
        write, count = metrics_log.Events._write, iter(range(1000))

        def fail(events, event):
            if next(count) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(events, event)

        with monkeypatch.context() as patch:
            patch.setattr(metrics_log.Events, "_write", fail)
            result = fit(make_cohort(), *make_loaders(), settings(tensorboard=True))
        lines = [x for x in capfd.readouterr().err.splitlines() if "TensorBoard" in x]
        told = "TensorBoard's events are no longer written (No space left on device)"
        assert [line.startswith(told) for line in lines] == [True] * (at < 100)
        assert [r["epoch"] for r in read_metrics(result.folder) if r["kind"] == "test"] == [1, 2, 3]
        fit(make_cohort(), *make_loaders(), settings(tensorboard=True, resume=True))
        (events,) = (result.folder / "tensorboard").iterdir()
        assert events.stat().st_size > 1000

    def test_for_a_line_of_the_log_is_one_line(self, settings):
        train, test = make_loaders()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        path = Path(settings().folder) / "metrics.jsonl"

        def fill():
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))

        try:
            with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: File too large"):
                fit(make_cohort(), CrashingLoader(train, 8, fill), test, settings())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        fit(make_cohort(), train, test, settings(resume=True))
        assert [r["epoch"] for r in read_metrics(path.parent) if r["kind"] == "test"] == [1, 2, 3]


class TestStderr:
    @pytest.mark.parametrize("kind", ["closed", "none", "full", "no reader"])
    def test_that_cannot_be_written_to_stops_nothing(self, settings, monkeypatch, kind):
        reader, writer = os.pipe()
        os.close(reader)
        place = {"full": "/dev/full", "no reader": writer}.get(kind, os.devnull)
        with contextlib.suppress(OSError), open(place, "w", 1) as stream:
            if kind == "closed":
                stream.close()
            monkeypatch.setattr(sys, "stderr", None if kind == "none" else stream)
            before = sys.stderr
            result = fit(make_cohort(), *make_loaders(), settings(progress=True))
            assert sys.stderr is before
        assert result.history[-1]["epoch"] == 3
        if kind != "no reader":
            os.close(writer)

    def test_gets_its_line_after_the_checkpoint_of_the_epoch(self, settings, monkeypatch):
        positions = []

        class Stream(io.StringIO):
            def write(self, text):
                if "epoch" in text:
                    state = checkpoint.load(Path(settings().folder) / "last.ckpt")
                    positions.append(state["position"])
                return len(text)

        monkeypatch.setattr(sys, "stderr", Stream())
        fit(make_cohort(), *make_loaders(), settings(log_every=0, save_every_minutes=0))
        assert positions == [6, 12, 18]


class TestHandMadeCheckpoints:
    """Of the right format, and yet not what a run saves."""

    def damaged(self, settings, change) -> str:
        path = Path(settings().folder) / "last.ckpt"
        if not path.exists():
            fit(make_cohort(), *make_loaders(), settings(epochs=1, ema=0.5, amp="fp16", lr=1e-3))
        before = path.read_bytes()
        state = checkpoint.load(path)
        change(state)
        torch.save(state, path)
        config = settings(epochs=2, ema=0.5, amp="fp16", lr=1e-3, resume=True)
        with pytest.raises(InputError) as error:
            fit(make_cohort(), *make_loaders(), config)
        path.write_bytes(before)
        assert "\n" not in str(error.value)
        assert re.search(r"last\.ckpt|the averages are of another cohort", str(error.value))
        return str(error.value)

    def test_a_missing_entry_is_named(self, settings):
        fit(make_cohort(), *make_loaders(), settings(epochs=1, ema=0.5, amp="fp16", lr=1e-3))
        state = checkpoint.load(Path(settings().folder) / "last.ckpt")
        # Without a loss on features; not in checkpoints of earlier versions.
        unused = {"format", "metric", "description", "threads"}
        for name in state.keys() - unused:
            assert name in self.damaged(settings, lambda state, name=name: state.pop(name))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("position", -1),
            ("position", "six"),
            ("position", 2.5),
            ("config", None),
            ("description", []),
            ("description", {"image_shape": 3}),
            ("cohort", []),
            ("optimizer", {}),
            ("optimizer", {"state": {}, "param_groups": []}),
            ("scaler", None),
            ("ema", None),
            ("ema", {"a": 1}),
            ("updates", None),
            ("overflows", torch.zeros(5)),
            ("rng", {}),
            ("rng", {"cpu": torch.zeros(3), "cuda": None}),
            ("totals", {"sums": 1}),
            ("clock", [1]),
            ("clock", None),
            ("seconds", "long"),
            ("history", 7),
            ("history", [{}]),
            ("scores", {"top1": 1}),
            ("best_scores", {"mAP": 1}),
            ("best_epoch", None),
        ],
    )
    def test_an_entry_of_another_kind_is_one_line(self, settings, name, value):
        self.damaged(settings, lambda state: state.update({name: value}))


class TestIndependent:
    def test_same_weights_same_batches_no_kl(self, settings, tmp_path):
        mutual, both, alone = make_cohort(), make_cohort(), make_cohort()
        fit(mutual, *make_loaders(), settings(folder=str(tmp_path / "mutual")))
        result = fit(both, *make_loaders(), settings(independent=True))
        fit(alone, *make_loaders(), settings(folder=str(tmp_path / "alone"), kl_weight=0))
        assert same_weights(both, mutual)
        loaded = Cohort.load(result.folder / "independent", peers=list(make_cohort(7).peers))
        assert same_weights(loaded, alone)
        assert not same_weights(alone, mutual)
        assert logged(result.folder / "independent") == logged(tmp_path / "alone")
        summary = json.loads((result.folder / "summary.json").read_text())
        assert summary["mutual"]["scores"]["top1"] == result.scores.top1
        assert summary["independent"]["scores"]["top1"] == result.independent.scores.top1
        assert result.independent.config.kl_weight == 0

    def test_a_run_in_a_folder_called_independent_is_mutual_first(self, settings, tmp_path, capfd):
        folder = tmp_path / "independent"
        fit(make_cohort(), *make_loaders(), settings(independent=True, folder=str(folder)))
        said = re.findall(r"^(\w+)(: | epoch )", capfd.readouterr().err, re.MULTILINE)
        phases = [label for label, _ in said if label in ("mutual", "independent")]
        half = len(phases) // 2
        assert phases == ["mutual"] * half + ["independent"] * half
        assert half > 1

    @pytest.mark.parametrize("at", [8, 17, 20, 35])
    def test_resumes_in_either_phase(self, settings, tmp_path, at):
        whole, again = make_cohort(), make_cohort()
        unbroken = fit(whole, *make_loaders(), settings(independent=True, save_every_steps=4))
        config = settings(
            independent=True, save_every_steps=4, folder=str(tmp_path / "broken"), log_every=4
        )
        train, test = make_loaders()
        count = iter(range(100))

        def crash_later():
            if next(count) == at // 18:  # the second phase draws the same steps again
                raise Crash

        with pytest.raises(Crash):
            fit(make_cohort(), CrashingLoader(train, at % 18, crash_later), test, config)
        other = make_cohort() if at < 18 else make_cohort(seed=3)  # the weights are in the folder
        resumed = fit(other, *make_loaders(), config.replace(resume=True))
        again = other
        assert same_weights(again, whole)
        assert logged(resumed.folder) == logged(unbroken.folder)
        for sub in ("", "independent"):
            a = checkpoint.load(resumed.folder / sub / "last.ckpt")["cohort"]
            b = checkpoint.load(unbroken.folder / sub / "last.ckpt")["cohort"]
            assert all(torch.equal(a[key], b[key]) for key in b)
        assert resumed.independent.scores == unbroken.independent.scores


class Bomb(nn.Module):
    """A peer whose logits turn bad at one of its forward passes in training."""

    def __init__(self, peer: nn.Module, at: int, value: float = math.nan) -> None:
        super().__init__()
        self.peer, self.at, self.value = peer, at, value
        self.num_classes = CLASSES
        self.passes = 0

    def forward(self, x):
        z = self.peer(x)
        if self.training:
            self.passes += 1
            if self.passes == self.at:
                z = z * self.value
        return z


class TestDivergence:
    @pytest.mark.parametrize("log_every", [0, 1, 4])
    def test_stops_with_peer_step_and_loss_and_keeps_the_checkpoint(self, settings, log_every):
        peers = list(make_cohort(widths=(4, 5, 6)).peers)
        cohort = Cohort([peers[0], Bomb(peers[1], at=9), peers[2]], CLASSES)
        config = settings(log_every=log_every, save_every_steps=1 if log_every == 1 else 0)
        with pytest.raises(TrainingDiverged) as stopped:
            fit(cohort, *make_loaders(), config)
        message = str(stopped.value)
        assert "at step 9 (epoch 2) the cross-entropy of peer 1 (Bomb) is not finite" in message
        assert "last.ckpt, from before it, is kept" in message
        assert "\n" not in message
        state = checkpoint.load(Path(config.folder) / "last.ckpt")
        assert state["position"] == (8 if log_every == 1 else 6)
        for value in state["cohort"].values():
            assert value.isfinite().all()

    def test_in_the_first_epoch_the_start_is_kept(self, settings):
        peers = list(make_cohort().peers)
        cohort = Cohort([Bomb(peers[0], at=2, value=math.inf), peers[1]], CLASSES)
        with pytest.raises(TrainingDiverged, match=r"step 2 \(epoch 1\).*from before it, is kept"):
            fit(cohort, *make_loaders(), settings())
        assert checkpoint.load(Path(settings().folder) / "last.ckpt")["position"] == 0

    def test_weights_gone_bad_in_the_last_update_are_not_saved(self, settings):
        cohort = make_cohort()
        train, _ = make_loaders()

        def spoil():
            cohort.peers[1].head.bias.register_hook(lambda g: g * math.nan)

        with pytest.raises(TrainingDiverged, match=r"step 12 \(epoch 2\) a weight of peer 1"):
            fit(cohort, CrashingLoader(train, 11, spoil), None, settings())
        state = checkpoint.load(Path(settings().folder) / "last.ckpt")
        assert state["position"] == 6


@pytest.mark.parametrize("peers", [(0,), (0, 1)])
def test_overflow_in_fp16_holds_the_schedule_back_where_no_peer_is_updated(settings, peers):
    """A peer that overflows alone skips its own update; the other and the schedule go on."""
    cohort = make_cohort()
    train, test = make_loaders()

    def overflow_in(steps):
        count = iter(range(1000))
        return lambda g: g * math.inf if next(count) in steps else g

    for k in peers:
        cohort.peers[k].head.bias.register_hook(overflow_in((1, 2, 3)))
    config = settings(amp="fp16", epochs=2, warmup_epochs=2, lr=0.12)
    result = fit(cohort, train, test, config)
    held = 3 if len(peers) == 2 else 0
    assert result.skipped_steps == held
    assert [r["skipped_steps"] for r in result.history] == [held, held]
    assert result.history[-1]["skipped_updates"] == [3, 3 if len(peers) == 2 else 0]
    # 12 steps of warm-up; where 3 were held back, the rate of the ninth
    assert result.history[-1]["lr"] == pytest.approx(0.12 * (12 - held) / 12)
    assert all(w.isfinite().all() for w in cohort.parameters())


class TestAverages:
    def test_averages_are_evaluated_and_saved_and_training_goes_on_without_them(self, settings):
        seen = []

        def evaluate(cohort):
            seen.append({k: v.clone() for k, v in cohort.state_dict().items()})
            return score(cohort)

        train, test = make_loaders()
        plain, averaged = make_cohort(), make_cohort()
        plain_folder, folder = settings().folder + "-plain", settings().folder
        amp = Amp(torch.device("cpu"), None, None)
        score = functools.partial(classification.score, test=test, amp=amp)
        fit(plain, train, evaluate, settings(folder=plain_folder))
        own = checkpoint.load(Path(plain_folder) / "last.ckpt")["cohort"]
        del seen[:]
        fit(averaged, train, evaluate, settings(ema=0.75))
        state = checkpoint.load(Path(folder) / "last.ckpt")
        assert all(torch.equal(state["cohort"][key], own[key]) for key in own)
        for key, value in state["ema"].items():
            assert torch.equal(value, seen[-1][key])
            assert torch.equal(value, averaged.state_dict()[key])
        assert not torch.equal(own["peers.0.head.weight"], seen[-1]["peers.0.head.weight"])
        loaded = Cohort.load(folder, peers=list(make_cohort(7).peers))
        assert same_weights(loaded, averaged)

    @pytest.mark.parametrize("at", [8, 17])
    def test_resume(self, settings, tmp_path, at):
        whole, again = make_cohort(), make_cohort()
        options = {"ema": 0.9, "accumulate": 4, "grad_clip": 0.5, "save_every_steps": 1}
        fit(whole, *make_loaders(), settings(**options))
        config = settings(**options, folder=str(tmp_path / "broken"))
        train, test = make_loaders()
        with pytest.raises(Crash):
            fit(make_cohort(), CrashingLoader(train, at), test, config)
        fit(again, *make_loaders(), config.replace(resume=True))
        assert same_weights(again, whole)


class TestExecutions:
    def cohort(self):
        return make_cohort(widths=(4, 4))

    def test_stacked_runs_are_eager_runs_and_resume(self, settings, tmp_path):
        cohorts = {}
        for execution in ("eager", "stacked"):
            cohorts[execution] = self.cohort()
            folder = str(tmp_path / execution)
            config = settings(execution=execution, folder=folder, lr=0.02)
            fit(cohorts[execution], *make_loaders(), config)
        for a, b in zip(*(c.state_dict().values() for c in cohorts.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        config = settings(
            execution="stacked", folder=str(tmp_path / "broken"), lr=0.02, save_every_steps=1
        )
        train, test = make_loaders()
        with pytest.raises(Crash):
            fit(self.cohort(), CrashingLoader(train, 8), test, config)
        again = self.cohort()
        fit(again, *make_loaders(), config.replace(resume=True))
        assert same_weights(again, cohorts["stacked"])

    def test_auto_goes_on_with_the_execution_of_the_run(self, settings):
        train, test = make_loaders()
        config = settings(execution="stacked", save_every_steps=1)
        with pytest.raises(Crash):
            fit(self.cohort(), CrashingLoader(train, 8), test, config)
        result = fit(self.cohort(), train, test, config.replace(resume=True, execution="auto"))
        assert checkpoint.load(result.folder / "last.ckpt")["execution"] == "stacked"

    def test_what_cannot_run_here_makes_no_folder(self, settings):
        for execution, message in (
            (
                "graph",
                "execution 'graph' needs a CUDA device, not cpu: use eager or threads or stacked",
            ),
            ("stacked", "needs peers of one architecture: conv differs between peers 0 and 1"),
        ):
            with pytest.raises(InputError, match=message):
                fit(make_cohort(), *make_loaders(), settings(execution=execution, device="cpu"))
            assert not Path(settings().folder).exists()

    def test_profile_leaves_a_trace_and_a_page(self, settings):
        result = fit(make_cohort(), *make_loaders(), settings(profile=True))
        assert json.loads((result.folder / "trace.json").read_text())["traceEvents"]
        text = (result.folder / "profile.txt").read_text()
        assert "operators a step" in text
        assert "aten::convolution_backward" in text
        assert len(text.splitlines()) < 40


def test_the_step_loop_never_asks_for_a_value(settings, monkeypatch):
    """Python's ways to a tensor's value fail while steps run; reading and saving may use them."""
    from fastdml.train.trainer import Phase

    running = [False]
    calls = []

    def guard(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            calls.append(name)
            assert not running[0], f"Tensor.{name} within the step loop"
            return original(self, *args, **kwargs)

        return method

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, guard(name))

    def with_running(owner, name, value):
        original = getattr(owner, name)

        def method(self, *args):
            was, running[0] = running[0], value
            try:
                return original(self, *args)
            finally:
                running[0] = was

        monkeypatch.setattr(owner, name, method)

    with_running(Phase, "_epoch", True)
    with_running(Phase, "_begin", False)
    with_running(Phase, "_read", False)
    with_running(Phase, "_save", False)
    # On a CPU the loss looks at the labels, which are at hand there; the GPU test watches CUDA.
    with_running(MutualLoss, "value_and_grad", False)
    for amp, update in (("off", "simultaneous"), ("fp16", "sequential")):
        config = settings(
            amp=amp,
            update=update,
            folder=settings().folder + amp,
            save_every_steps=4,
            progress=True,
        )
        fit(make_cohort(), *make_loaders(), config)
    assert calls  # the guard is in place: reading did use them


class TestDryRun:
    def test_says_what_would_happen_and_writes_nothing(
        self, settings, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        config = settings(dry_run=True, independent=True, epochs=7)
        assert fit(make_cohort(), *make_loaders(), config) is None
        out = capsys.readouterr().out
        assert "6 an epoch of 16 images, 7 epochs, 84 in all (mutual and independent)" in out
        for part in ("TinyPeer-1", "parameters", "fp32", "MB", config.folder, "initial.ckpt"):
            assert part in out
        assert list(tmp_path.iterdir()) == []

    def test_does_not_download(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError):
            training.cifar10(root=tmp_path / "none", download=True, dry_run=True)
        assert list(tmp_path.iterdir()) == []


class TestDataSets:
    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(self, tmp_path, monkeypatch):
        pytest.importorskip("sklearn")
        monkeypatch.chdir(tmp_path)

    def test_digits_from_python(self):
        result = training.digits(epochs=2, subset=640, amp="off", tensorboard=False)
        assert result.folder == Path("runs/digits-resnet8-resnet8-001")
        assert result.history[-1]["step"] == 2 * 640 // 64
        assert result.scores.rows > 300
        assert result.scores.ensemble_top1 > 0.2

    @pytest.mark.parametrize("loader", ["torch", "dali"])
    def test_another_loader_trains_the_same_peers(self, loader):
        """Images that differ by rounding at most leave weights that do."""
        if loader == "dali" and not make.has_dali():
            pytest.skip("DALI is not installed")
        weights = {}
        for kind in ("resident", loader):
            options = {"epochs": 1, "subset": 192, "amp": "off", "lr": 0.01, "device": "cpu"}
            result = training.digits(
                ["resnet8"], loader=kind, folder=kind, tensorboard=False, **options
            )
            assert result.config.loader == kind
            weights[kind] = checkpoint.load(Path(kind) / "last.ckpt")["cohort"]
        exact = {"rtol": 0, "atol": 0} if loader == "torch" else {"rtol": 1e-3, "atol": 1e-4}
        for key, value in weights["resident"].items():
            torch.testing.assert_close(weights[loader][key], value, **exact)

    def test_mistakes_leave_nothing_behind(self):
        for changes, message in (
            ({"peers": ["resnet99"]}, "resnet"),
            ({"peers": []}, "peers is empty"),
            ({"batch_size": 5000}, "batch size 5000 is larger than"),
            ({"subset": 10**6}, "subset of 1000000"),
            ({"device": "tpu9"}, "no run on device 'tpu9' here: use auto"),
            ({"device": "meta"}, "no run on device 'meta' here: use auto"),
            ({"device": "cuda:99"}, "no run on device 'cuda:99' here: use auto"),
            ({"epoch": 3}, "unknown setting 'epoch'; did you mean epochs"),
        ):
            with pytest.raises(InputError, match=message) as caught:
                training.digits(**changes)
            assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=r"nowhere: .* or use download=True$"):
            training.cifar100(root="nowhere")
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("count", "offered"),
        [
            (0, "use auto or cpu; torch finds no CUDA device"),
            (1, "use auto, cpu, cuda or cuda:0"),
            (4, "use auto, cpu, cuda or cuda:0 to cuda:3"),
        ],
    )
    @pytest.mark.parametrize("asked", ["cuda:9", "mps", "gpu"])
    def test_devices_that_are_not_there_are_not_offered(self, monkeypatch, count, offered, asked):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        with pytest.raises(InputError, match=f"no run on device '{asked}' here: {offered}$"):
            training.digits(device=asked)

    def test_killed_in_mid_epoch(self, tmp_path):
        """kill -9, for real: the weights end up the same, bit for bit, and so do the metrics."""
        options = {
            "epochs": 2, "subset": 640, "amp": "off", "device": "cpu", "tensorboard": False,
            "log_every": 1, "save_every_steps": 3, "execution": "eager", "threads": 1,
        }  # fmt: skip
        script = f"from fastdml import train; train.digits(folder='broken', **{options!r})"
        training.digits(folder="whole", **options)
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        log = Path("broken/metrics.jsonl")
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert checkpoint.load(Path("broken/last.ckpt"))["position"] < 20
        training.digits(folder="broken", resume=True)
        a, b = (checkpoint.load(Path(f) / "last.ckpt")["cohort"] for f in ("whole", "broken"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert logged("whole") == logged("broken")


def test_config_is_recorded_as_plain_values(settings):
    fit(make_cohort(), *make_loaders(), settings(epochs=1))
    state = checkpoint.load(Path(settings().folder) / "last.ckpt")
    assert TrainConfig(**state["config"]) == settings(epochs=1, **OWN)
