"""Validation images choose the best weights and when to stop; the test set is read once, at the
end."""

from __future__ import annotations

import json
import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import Crash, CrashingLoader, logged, same_weights
from tiny_runs import make_cohort, make_images, make_loaders

import fastdml
from fastdml.cli.main import main
from fastdml.cohort import Cohort
from fastdml.data import ResidentLoader, load_digits
from fastdml.errors import InputError
from fastdml.report import plots
from fastdml.report.metrics_log import MetricsLog, read_metrics
from fastdml.report.predictions import PREDICTIONS
from fastdml.report.tables import summary_table
from fastdml.train import (
    Callback,
    EndEvent,
    EvaluationEvent,
    checkpoint,
    evaluate,
    evaluations,
    fit,
    predictions,
    trainer,
)
from fastdml.train.tasks import classification
from fastdml.train.tasks.classification import SCORING, Classification

pytestmark = pytest.mark.usefixtures("_no_pictures")


class Counted(ResidentLoader):
    """Counts the passes over its images that are read to their end."""

    passes = 0

    def epoch(self, epoch, start=0):
        yield from super().epoch(epoch, start)
        self.passes += 1


def held_out(seed: int = 3, n: int = 40) -> Counted:
    return Counted(make_images(n, seed), 20, train=False)


def fitted(config, **options):
    """A run with 40 validation and 60 test images: result, peers, passes over the test."""
    train, test = options.pop("train", None) or make_loaders()[0], held_out(2, 60)
    cohort = options.pop("cohort", None) or make_cohort()
    result = fit(cohort, train, test, config, validation=held_out(), **options)
    return result, cohort, test.passes


def plain(scores):
    return json.loads(json.dumps(vars(scores)))


def peers():
    return [*make_cohort(9).peers]


def chosen_before_the_end(settings):
    """Settings under which the best of the validation scores is not the last."""
    return settings(epochs=4, lr=0.3)


class TestTheTestSet:
    def test_is_read_once_for_the_last_and_once_for_the_best_weights(self, settings):
        result, cohort, passes = fitted(chosen_before_the_end(settings))
        assert result.best_epoch < 4
        assert passes == 2
        last = Cohort.load(result.folder, peers=peers())
        best = Cohort.load(result.weights["best"], peers=peers())
        assert same_weights(last, cohort)
        assert not same_weights(best, cohort)
        assert result.scores == evaluate(last, held_out(2, 60), "off")
        assert result.best_scores == evaluate(best, held_out(2, 60), "off")
        assert result.validation_scores == evaluate(last, held_out(), "off")
        assert result.best_validation_scores == evaluate(best, held_out(), "off")

    def test_is_read_once_where_the_last_weights_are_the_best(self, settings):
        result, _, passes = fitted(settings(epochs=1))
        assert (result.best_epoch, passes) == (1, 1)
        assert result.scores == result.best_scores

    def test_is_not_read_again_by_a_run_resumed_at_its_end(self, settings):
        config = chosen_before_the_end(settings)
        first = fitted(config)[0]
        again, _, passes = fitted(config.replace(resume=True), cohort=make_cohort(5))
        assert passes == 0
        assert (again.scores, again.best_scores) == (first.scores, first.best_scores)
        assert again.best_validation_scores == first.best_validation_scores
        assert len([r for r in read_metrics(first.folder) if r["kind"] == "test"]) == 2

    @pytest.mark.parametrize("at", [3, 14, 22])
    def test_is_read_at_the_end_of_a_resumed_run(self, settings, tmp_path, at):
        config = chosen_before_the_end(settings).replace(save_every_steps=2)
        whole, trained, _ = fitted(config)
        config = config.replace(folder=str(tmp_path / "broken"))
        with pytest.raises(Crash):
            fitted(config, train=CrashingLoader(make_loaders()[0], at))
        result, again, passes = fitted(config.replace(resume=True))
        assert passes == 2
        assert same_weights(again, trained)
        assert logged(result.folder) == logged(whole.folder)
        assert result.best_scores == whole.best_scores

    @pytest.mark.parametrize(
        ("moment", "again"),
        [("reading", 2), ("predictions", 2), ("last logged", 0), ("best logged", 0), ("saved", 0)],
    )
    def test_a_run_killed_at_its_end_loses_nothing(
        self, settings, tmp_path, monkeypatch, moment, again
    ):
        """Neither scores nor predictions, nor a line of the log."""

        def die(*_):
            raise Crash

        def log(self, kind, *position, weights=None, **values):
            if moment == f"{weights} logged":
                raise Crash
            return was(self, kind, *position, **({"weights": weights} if weights else {}), **values)

        config, was = chosen_before_the_end(settings), MetricsLog.log
        whole = fitted(config.replace(folder=str(tmp_path / "whole")))[0]
        with monkeypatch.context() as patch:
            if moment == "reading":
                patch.setattr(evaluations, "evaluating", die)
            elif moment == "predictions":
                patch.setattr(predictions, "write_predictions", die)
            elif moment == "saved":
                patch.setattr(trainer, "result_of", die)
            patch.setattr(MetricsLog, "log", log)
            with pytest.raises(Crash):
                fitted(config)
        result, _, passes = fitted(config.replace(resume=True))
        assert passes == again
        assert logged(result.folder) == logged(whole.folder)
        ours, theirs = (dict(np.load(r.folder / PREDICTIONS)) for r in (result, whole))
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])

    def test_with_independent_once_for_each(self, settings):
        config = chosen_before_the_end(settings).replace(independent=True)
        result, _, passes = fitted(config)
        alone = result.independent
        changed = (result.best_epoch < 4) + (alone.best_epoch < 4)
        assert passes == 2 + changed
        best = Cohort.load(alone.weights["best"], peers=peers())
        assert alone.best_scores == evaluate(best, held_out(2, 60), "off")
        assert alone.chosen_on == result.chosen_on == "validation"
        assert "chosen_on" in json.loads((alone.folder / "summary.json").read_text())

    def test_averages_are_what_is_scored(self, settings):
        config = chosen_before_the_end(settings).replace(ema=0.8)
        result = fitted(config)[0]
        for weights, scores in (("last", result.scores), ("best", result.best_scores)):
            saved = Cohort.load(result.weights[weights], peers=peers())
            assert scores == evaluate(saved, held_out(2, 60), "off")

    def test_prolonging_reads_it_at_the_new_end(self, settings):
        config = settings(epochs=2)
        fitted(config)
        result, _, passes = fitted(config.replace(epochs=4, resume=True))
        assert 1 <= passes <= 2
        ends = [r["step"] for r in read_metrics(result.folder) if r["kind"] == "test"]
        assert ends == [12, 12, 24, 24]

    def test_may_be_absent(self, settings):
        result = fit(make_cohort(), make_loaders()[0], None, settings(), validation=held_out())
        assert (result.chosen_on, result.scored_on) == ("validation", "validation")
        assert result.best_scores == result.best_validation_scores
        summary = json.loads((result.folder / "summary.json").read_text())
        assert (summary["chosen_on"], summary["scored_on"]) == ("validation", "validation")
        table = summary_table(summary, SCORING)
        assert "validation scores (no test set) of the weights that the validation" in table
        assert not [r for r in read_metrics(result.folder) if r["kind"] == "test"]


class TestWhatIsSaid:
    def test_summary_tables_and_log(self, settings, capsys):
        result = fitted(chosen_before_the_end(settings))[0]
        said = capsys.readouterr().err
        assert "epoch 1/4  loss" in said
        assert "  val top-1 " in said
        summary = json.loads((result.folder / "summary.json").read_text())
        assert (summary["chosen_on"], summary["scored_on"]) == ("validation", "test")
        assert [peer["accuracy_mutual"] for peer in summary["peers"]] == result.best_scores.top1
        assert summary["ensemble_mutual"] == result.best_scores.ensemble_top1
        run = summary["mutual"]
        assert run["scores"]["top1"] == result.scores.top1
        assert run["best_scores"]["top1"] == result.best_scores.top1
        assert run["validation"]["scores"]["top1"] == result.validation_scores.top1
        assert run["validation"]["best_scores"]["top1"] == result.best_validation_scores.top1
        chosen = "test scores of the weights that the validation images chose: of epoch"
        assert f"{chosen} {result.best_epoch}" in summary_table(summary, SCORING).splitlines()
        assert f"{100 * result.best_scores.top1[0]:.2f}" in str(result).splitlines()[2]
        assert f"test scores of epoch {result.best_epoch}, which validation chose" in str(result)
        kinds = [r["kind"] for r in read_metrics(result.folder) if r["kind"] != "train"]
        assert kinds == ["peers", *["epoch", "validation"] * 4, "test", "test"]
        assert [r["validation"] for r in result.history][-1] == plain(result.validation_scores)

    def test_a_frame_has_the_scores_of_validation(self, settings, monkeypatch):
        """Of the rows that pandas is given, which need not be installed here."""
        monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
        result = fitted(settings(epochs=2))[0]
        rows = result.to_frame()
        assert len(rows) == 2 * len(result.peers)
        for row in rows:
            scores = result.history[int(row["epoch"]) - 1]["validation"]["top1"]
            assert row["validation_top1"] == scores[result.peers.index(row["peer"])]
            assert "test_top1" not in row

    def test_without_validation_it_is_the_test_images(self, settings):
        result = fit(make_cohort(), *make_loaders(), settings())
        assert (result.chosen_on, result.scored_on) == ("test", "test")
        summary = json.loads((result.folder / "summary.json").read_text())
        assert summary["chosen_on"] == "test"
        assert summary["mutual"]["validation"] is None
        assert [peer["accuracy_mutual"] for peer in summary["peers"]] == result.scores.top1
        assert "validation" not in summary_table(summary, SCORING)
        nothing = fit(
            make_cohort(), make_loaders()[0], None, settings(folder=settings().folder + "-none")
        )
        assert (nothing.chosen_on, nothing.scored_on) == (None, None)

    def test_callbacks(self, settings):
        events = []

        class Keeps(Callback):
            def on_evaluation(self, event):
                events.append(event)

            on_end = on_evaluation

        result = fitted(chosen_before_the_end(settings), callbacks=[Keeps()])[0]
        *during, end = events
        assert {type(event) for event in during} == {EvaluationEvent}
        assert [event.data for event in during] == ["validation"] * 4
        assert isinstance(end, EndEvent)
        assert end.chosen_on == "validation"
        assert end.best_scores == plain(result.best_scores)

    def test_curves_are_of_validation(self, settings, monkeypatch):
        monkeypatch.undo()
        result = fitted(settings(epochs=2))[0]
        panels = plots._panels(read_metrics(result.folder), 2, SCORING.headlines)
        assert panels[-1] == ("validation", "top1", "validation accuracy (%)", 100.0)
        assert (result.folder / "curves.png").stat().st_size > 1000


class TestPatience:
    def scripted(self, means):
        """An evaluation that gives these means in turn, whatever the peers are."""
        remaining = iter(means)
        real = evaluate(make_cohort(), held_out(), "off")

        def score(cohort):
            return replace(real, top1=[next(remaining)] * 2)

        return score

    def run(self, config, means, **options):
        return fit(
            options.pop("cohort", None) or make_cohort(),
            options.pop("train", None) or make_loaders()[0],
            held_out(2, 60),
            config,
            validation=self.scripted(means),
            **options,
        )

    @pytest.mark.parametrize(
        ("means", "patience", "eval_every", "ends"),
        [
            ([0.5, 0.6, 0.6, 0.55, 0.7], 2, 1, 4),
            ([0.5, 0.6, 0.6, 0.65, 0.6, 0.6], 2, 1, 6),
            ([0.5, 0.4], 1, 1, 2),
            ([0.5, 0.4], 1, 2, 4),
            ([0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 6, 1, 7),
        ],
    )
    def test_ends_after_so_many_evaluations(self, settings, means, patience, eval_every, ends):
        config = settings(epochs=8, patience=patience, eval_every=eval_every)
        result = self.run(config, means)
        assert result.history[-1]["epoch"] == ends
        assert result.stopped.startswith("no better validation top-1 in")
        table = summary_table(json.loads((result.folder / "summary.json").read_text()), SCORING)
        assert f"mutual training stopped early, after epoch {ends}: no better" in table
        assert "stopped early: no better validation" in str(result)

    def test_one_that_ends_in_time_is_not_stopped(self, settings):
        result = self.run(settings(epochs=3, patience=2), [0.5, 0.4, 0.3])
        assert result.stopped is None

    def test_the_schedule_knows_nothing_of_it(self, settings, tmp_path):
        short, stopped = make_cohort(), make_cohort()
        config = settings(epochs=8, schedule="cosine")
        self.run(config.replace(patience=1), [0.5, 0.4], cohort=stopped)

        class Second(Callback):
            def on_epoch(self, event):
                return "enough" if event.epoch == 2 else None

        config = config.replace(folder=str(tmp_path / "plain"))
        self.run(config, [0.5, 0.6], cohort=short, callbacks=[Second()])
        assert same_weights(short, stopped)

    @pytest.mark.parametrize("at", [4, 13, 20])
    def test_resumes_exactly(self, settings, tmp_path, at):
        config = settings(epochs=9, patience=2, save_every_steps=1)
        whole, again = make_cohort(), make_cohort()
        means = [0.5, 0.6, 0.6, 0.55, 0.7, 0.7]
        self.run(config, means, cohort=whole)
        config = config.replace(folder=str(tmp_path / "broken"))
        with pytest.raises(Crash):
            self.run(config, means, train=CrashingLoader(make_loaders()[0], at))
        result = self.run(config.replace(resume=True), means[at // 6 :], cohort=again)
        assert same_weights(whole, again)
        assert result.history[-1]["epoch"] == 4
        assert logged(tmp_path / "broken") == logged(tmp_path / "run")

    def test_a_stopped_run_stays_so(self, settings):
        config = settings(epochs=9, patience=1)
        first = self.run(config, [0.5, 0.4])
        again = self.run(config.replace(resume=True), [])
        assert again.stopped == first.stopped
        assert again.history == first.history

    def test_the_independent_training_has_its_own(self, settings):
        config = settings(epochs=6, patience=1, independent=True)
        result = self.run(config, [0.5, 0.4, 0.5, 0.6, 0.6])
        assert (len(result.history), len(result.independent.history)) == (2, 3)

    def test_needs_validation(self, settings, tmp_path):
        with pytest.raises(InputError, match="patience=2 needs validation images, which say when"):
            fit(make_cohort(), *make_loaders(), settings(patience=2))
        assert not (tmp_path / "run").exists()


class TestFit:
    def test_the_setting_is_for_sets_that_are_known(self, settings, tmp_path):
        with pytest.raises(
            InputError, match=r"validation=0\.1 divides the data sets that .* as val"
        ):
            fit(make_cohort(), *make_loaders(), settings(validation=0.1))
        assert not (tmp_path / "run").exists()

    def test_a_resumed_run_keeps_its_validation(self, settings):
        config = settings(epochs=1)
        fitted(config)
        with pytest.raises(
            InputError, match=r"cannot resume: data was '.*, with validation' and is"
        ):
            fit(make_cohort(), *make_loaders(), config.replace(resume=True))

    @pytest.mark.parametrize("source", [5, [], [torch.zeros(3)]])
    def test_what_is_no_validation(self, settings, source):
        with pytest.raises(InputError, match="validation"):
            fit(make_cohort(), make_loaders()[0], None, settings(), validation=source)

    def test_other_classes_are_refused(self, settings):
        images = make_images(20, 1)
        other = ResidentLoader(replace(images, class_names=tuple("abdc")), 20, train=False)
        with pytest.raises(InputError, match="the validation data have other classes"):
            fit(make_cohort(), make_loaders()[0], None, settings(), validation=other)


def digits(tmp_path, **changes):
    values = {
        "epochs": 1, "batch_size": 32, "tensorboard": False, "amp": "off", "execution": "eager",
        "threads": 1, "validation": 0.1, "schedule": "step", "subset": 64,
        "folder": tmp_path / "digits",
    }  # fmt: skip
    return fastdml.train.digits(["resnet8"], **{**values, **changes})


class TestByName:
    @pytest.mark.parametrize("subset", [0, 200])
    def test_no_validation_image_is_trained_on(self, tmp_path, monkeypatch, subset):
        """Images are known by their bytes; those that occur twice in the set are left out."""
        seen = {}
        loader = classification.make_loader

        def noting(kind, source, *args, **options):
            seen["train"] = source
            return loader(kind, source, *args, **options)

        class Noting(ResidentLoader):
            def __init__(self, source, *args, **options):
                seen[len(source)] = source
                super().__init__(source, *args, **options)

        monkeypatch.setattr(classification, "make_loader", noting)
        monkeypatch.setattr(classification, "ResidentLoader", Noting)
        digits(tmp_path, subset=subset, validation=100)
        train, test = load_digits()
        held = seen[100]
        assert len(seen["train"]) == (subset or len(train) - 100)
        assert len(test) in seen

        def places(part):
            whole = train.images.flatten(1)
            equal = (part.images.flatten(1)[:, None] == whole[None]).all(2)
            return [row.nonzero()[:, 0].tolist() for row in equal]

        unique = [
            {place[0] for place in places(p) if len(place) == 1} for p in (seen["train"], held)
        ]
        assert min(map(len, unique)) > 60
        assert not unique[0] & unique[1]

    def test_the_split_is_kept_on_resuming_and_another_refused(self, tmp_path):
        first = digits(tmp_path)
        assert first.config.validation == 0.1
        assert first.validation_scores.rows == round(0.1 * 1442)
        longer = digits(tmp_path, resume=True, epochs=2)
        assert longer.validation_scores.rows == first.validation_scores.rows
        for other in (0, 0.2):
            with pytest.raises(InputError, match=r"cannot resume: validation was 0\.1 and is now"):
                digits(tmp_path, resume=True, epochs=2, validation=other)

    def test_a_run_of_an_earlier_version_had_none(self, tmp_path):
        first = digits(tmp_path, validation=0)
        path = first.folder / "last.ckpt"
        state = checkpoint.load(path)
        del state["config"]["validation"], state["config"]["patience"], state["tested"]
        torch.save(state, path)
        config = (first.folder / "config.yaml").read_text()
        old = "".join(
            x for x in config.splitlines(True) if x.split(":")[0] not in ("validation", "patience")
        )
        (first.folder / "config.yaml").write_text(old)
        assert digits(tmp_path, validation=0, resume=True).scores == first.scores
        with pytest.raises(InputError, match=r"cannot resume: validation was 0\.0 and is now 0\.1"):
            digits(tmp_path, resume=True)

    @pytest.mark.parametrize(
        ("validation", "pattern"),
        [
            (-0.1, "validation must be a share below 1, a whole number of images, or 0, not -0.1"),
            (1.5, "validation must be a share below 1, a whole number"),
            (math.nan, "validation must be a finite number"),
            (1.0, "validation=1 is 1 of 1,442 images, for 10 classes: give at least 10"),
            (0.999, "validation=0.999 is 1,441 of 1,442 images: give at most 1,432"),
            (5000, "validation=5000 is 5,000 of 1,442 images: give at most 1,432"),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, validation, pattern):
        with pytest.raises(InputError, match=pattern) as error:
            digits(tmp_path, validation=validation)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "digits").exists()

    def test_on_the_command_line(self, tmp_path, capsys):
        folder = str(tmp_path / "run")
        options = ["--peers", "resnet8", "--epochs", "2", "--subset", "64", "--batch-size", "32"]
        options += [
            "--validation",
            "0.1",
            "--patience",
            "5",
            "--no-tensorboard",
            "--folder",
            folder,
        ]
        assert main(["train", "digits", *options, "--amp", "off"]) == 0
        assert (
            "test scores of the weights that the validation images chose" in capsys.readouterr().out
        )
        assert main(["evaluate", folder, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert shown["weights"] == "best"
        assert shown["scores"]["top1"] == summary["mutual"]["best_scores"]["top1"]
        assert main(["evaluate", folder]) == 0
        assert "best weights, chosen on validation images, of" in capsys.readouterr().out
        assert main(["evaluate", folder, "--weights", "last"]) == 0
        assert "last weights of" in capsys.readouterr().out

    def test_a_set_that_keeps_no_validation_images(self, tmp_path, monkeypatch):
        prepare = Classification.prepare

        @contextmanager
        def without(self, *args):
            with prepare(self, *args) as prepared:
                yield prepared._replace(validation=None)

        monkeypatch.setattr(Classification, "prepare", without)
        with pytest.raises(InputError, match=r"validation=0\.1: digits keeps no validation images"):
            digits(tmp_path)
