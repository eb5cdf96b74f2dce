"""Whole runs: what they leave, that they repeat, the independent phase, dry runs, data sets."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import Crash, CrashingLoader, environment, logged, same_weights
from tiny_runs import (
    CLASSES,
    OWN,
    SIDE,
    TinyPeer,
    make_cohort,
    make_images,
    make_loaders,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import train as training
from fastdml.cohort import Cohort
from fastdml.data.loaders import make
from fastdml.errors import InputError
from fastdml.metrics import ClassificationScores
from fastdml.report.metrics_log import read_metrics
from fastdml.train import (
    TrainConfig,
    checkpoint,
    fit,
)

pytestmark = pytest.mark.usefixtures("_no_pictures")  # a test that wants them calls undo


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
            "metrics.jsonl", "pairwise_kl.png", "peers", "predictions.npz", "summary.json",
            "tensorboard",
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
            fills = torch.utils.deterministic.fill_uninitialized_memory
            seen.append((torch.are_deterministic_algorithms_enabled(), fills))
            raise Crash

        with pytest.raises(Crash):
            fit(make_cohort(), make_loaders()[0], evaluate, settings(deterministic=True))
        assert seen == [(True, False)]
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory


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
