"""The loop of a run: averaged weights, executions, and that it never waits for the device."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from runs import Crash, CrashingLoader, same_weights
from tiny_runs import (
    make_cohort,
    make_loaders,
)

from fastdml.cohort import Cohort
from fastdml.engine import Amp
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.train import (
    checkpoint,
    fit,
)
from fastdml.train.tasks import classification

pytestmark = pytest.mark.usefixtures("_no_pictures")  # a test that wants them calls undo


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
    from fastdml.train.trainer import Trainer

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

    with_running(Trainer, "_epoch", True)
    with_running(Trainer, "_begin", False)
    with_running(Trainer, "_read", False)
    with_running(Trainer, "save", False)
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
