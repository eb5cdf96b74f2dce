"""Runs that are interrupted go on as if nothing had been, or say why they cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from runs import Crash, CrashingLoader, logged, same_weights, timeless
from tiny_runs import (
    CLASSES,
    CPU,
    make_cohort,
    make_images,
    make_loaders,
    terminate,
)
from torch.utils.data import DataLoader, TensorDataset

from fastdml.data import TorchLoader
from fastdml.errors import InputError
from fastdml.train import (
    TrainingStopped,
    checkpoint,
    fit,
)
from fastdml.train.batches import as_batches

pytestmark = pytest.mark.usefixtures("_no_pictures")  # a test that wants them calls undo


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


def test_the_refusal_of_another_length_names_the_schedule(settings):
    config = settings(schedule="cosine", epochs=1)
    fit(make_cohort(), *make_loaders(), config)
    for changes in ({"epochs": 2}, {"epochs": 0, "iterations": 9}):
        with pytest.raises(InputError, match=r"epochs was 1 and is now . \(with schedule cosine"):
            fit(make_cohort(), *make_loaders(), config.replace(**changes, resume=True))
    with pytest.raises(InputError, match=r"schedule was 'cosine' and is now 'step'; give"):
        fit(make_cohort(), *make_loaders(), settings(epochs=2, resume=True))


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
        unused = {"format", "metric", "description", "threads", "stopped", "tested", "data"}
        unused |= {"loss_schedules", "peer_weights"}  # of a run that has some
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
            ("data", [1]),
            ("data", {"training": 1}),
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
