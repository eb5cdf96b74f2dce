"""Callbacks: when they are called, with what, what they may ask for; and errors lose nothing."""

from __future__ import annotations

import json

import pytest
import torch
from runs import logged, same_weights
from tiny_runs import make_cohort, make_loaders

import fastdml
from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.report.metrics_log import read_metrics
from fastdml.train import Callback, EndEvent, EpochEvent, EvaluationEvent, checkpoint, fit

pytestmark = pytest.mark.usefixtures("_no_pictures")


class Notes(Callback):
    """Keeps every event, and checks that the checkpoint of its step is there."""

    def __init__(self) -> None:
        self.events = []

    def note(self, event):
        assert checkpoint.load(event.folder / "last.ckpt")["position"] == event.step
        self.events.append(event)

    on_epoch = on_evaluation = on_end = note

    def of(self, kind, run="mutual"):
        return [event for event in self.events if type(event) is kind and event.run == run]


class StopsAt(Callback):
    def __init__(self, epoch, method="on_epoch") -> None:
        self.epoch = epoch
        setattr(self, method, self.ask)

    def ask(self, event):
        return "that will do" if event.epoch >= self.epoch else None


class Breaks(Callback):
    def __init__(self, epoch, method="on_epoch") -> None:
        self.epoch = epoch
        setattr(self, method, self.fail)

    def fail(self, event):
        if event.epoch == self.epoch:
            raise RuntimeError("of the user")


def kinds(notes, run="mutual"):
    names = {EpochEvent: "epoch", EvaluationEvent: "evaluation", EndEvent: "end"}
    return [(names[type(e)], e.epoch) for e in notes.events if e.run == run]


class TestEvents:
    def test_they_say_what_the_run_says(self, settings):
        notes = Notes()
        result = fit(make_cohort(), *make_loaders(), settings(eval_every=2), callbacks=[notes])
        assert kinds(notes) == [
            *(("epoch", 1), ("evaluation", 2), ("epoch", 2), ("evaluation", 3), ("epoch", 3)),
            ("end", 3),
        ]
        first, _, last = notes.of(EpochEvent)
        assert (first.step, first.steps, first.epochs) == (6, 18, 3)
        assert first.folder == result.folder
        assert first.peers == result.peers
        assert first.seconds_left > 0 == last.seconds_left
        assert first.losses == {n: result.history[0][n] for n in ("loss", "ce", "kl")}
        assert last.lr == result.history[2]["lr"] == pytest.approx(0.1)
        assert last.record["ce"] == result.history[2]["ce"]
        scores = [event.scores for event in notes.of(EvaluationEvent)]
        assert scores == [record["test"] for record in result.history[1:]]
        best = max(notes.of(EvaluationEvent), key=lambda event: event.mean)
        assert best.best
        assert best.best_epoch == best.epoch == result.best_epoch
        assert {event.data for event in notes.of(EvaluationEvent)} == {"test"}
        (end,) = notes.of(EndEvent)
        assert end.scores == scores[-1]
        assert end.best_scores == best.scores
        assert (end.stopped, end.chosen_on, end.weights) == (None, "test", result.weights)

    def test_without_evaluation(self, settings):
        notes = Notes()
        fit(make_cohort(), make_loaders()[0], None, settings(epochs=1), callbacks=[notes])
        assert kinds(notes) == [("epoch", 1), ("end", 1)]
        assert (notes.events[-1].scores, notes.events[-1].chosen_on) == (None, None)

    def test_of_the_independent_run_too(self, settings):
        notes = Notes()
        config = settings(independent=True, epochs=2)
        result = fit(make_cohort(), *make_loaders(), config, callbacks=[notes])
        assert kinds(notes) == kinds(notes, "independent")
        assert {e.folder for e in notes.events if e.run == "independent"} == {
            result.folder / "independent"
        }
        assert notes.of(EpochEvent)[-1].seconds_left > 0  # the other training is to come

    def test_events_do_not_change(self, settings):
        notes = Notes()
        fit(make_cohort(), *make_loaders(), settings(epochs=1), callbacks=[notes])
        with pytest.raises(AttributeError):
            notes.events[0].epoch = 5

    def test_they_change_no_bit(self, settings, tmp_path):
        plain, watched = make_cohort(), make_cohort()
        fit(plain, *make_loaders(), settings())
        folder = str(tmp_path / "watched")
        fit(watched, *make_loaders(), settings(folder=folder), callbacks=[Notes(), Callback()])
        assert same_weights(plain, watched)
        assert logged(tmp_path / "watched") == logged(tmp_path / "run")

    def test_of_a_run_by_name(self, settings, tmp_path):
        notes = Notes()
        result = fastdml.train.digits(
            ["resnet8"], epochs=1, subset=64, batch_size=32, tensorboard=False,
            folder=tmp_path / "digits", callbacks=[notes],
        )  # fmt: skip
        assert kinds(notes) == [("evaluation", 1), ("epoch", 1), ("end", 1)]
        assert notes.events[-1].weights == result.weights


class TestStops:
    @pytest.mark.parametrize("method", ["on_epoch", "on_evaluation"])
    @pytest.mark.parametrize("eval_every", [1, 2])
    def test_end_the_training_as_its_end_does(self, settings, tmp_path, method, eval_every):
        """The weights are those of an equally long run: the schedule knows nothing of it."""
        short, notes = make_cohort(), Notes()
        fit(short, *make_loaders(), settings(epochs=2, folder=str(tmp_path / "short")))
        stopped = make_cohort()
        config = settings(epochs=9, eval_every=eval_every)
        asks = StopsAt(2, method)
        result = fit(stopped, *make_loaders(), config, callbacks=[asks, notes])
        assert same_weights(short, stopped)
        assert same_weights(Cohort.load(result.folder, peers=[*make_cohort(5).peers]), short)
        assert "test" in result.history[-1]
        assert result.history[-1]["epoch"] == 2
        (end,) = notes.of(EndEvent)
        assert (end.stopped, end.epoch) == ("that will do", 2)
        assert end.scores == result.history[-1]["test"]
        summary = json.loads((result.folder / "summary.json").read_text())
        assert summary["mutual"]["stopped"] == "that will do"

    def test_an_evaluation_that_was_not_due_is_made(self, settings):
        notes = Notes()
        config = settings(eval_every=3, epochs=9)
        fit(make_cohort(), *make_loaders(), config, callbacks=[StopsAt(1), notes])
        assert kinds(notes) == [("epoch", 1), ("evaluation", 1), ("end", 1)]
        assert [r["kind"] for r in read_metrics(config.folder)].count("test") == 1

    def test_the_independent_training_follows(self, settings):
        class MutualAlone(StopsAt):
            def ask(self, event):
                return super().ask(event) if event.run == "mutual" else None

        config = settings(independent=True)
        result = fit(make_cohort(), *make_loaders(), config, callbacks=[MutualAlone(1)])
        assert len(result.history) == 1
        assert len(result.independent.history) == 3

    def test_a_stopped_run_is_over(self, settings):
        config = settings(epochs=9)
        fit(make_cohort(), *make_loaders(), config, callbacks=[StopsAt(2)])
        notes, again = Notes(), make_cohort(5)
        result = fit(again, *make_loaders(), config.replace(resume=True), callbacks=[notes])
        assert result.history[-1]["epoch"] == 2
        assert notes.events == []

    def test_an_answer_that_is_no_reason(self, settings):
        class Says(Callback):
            def on_epoch(self, event):
                return True

        with pytest.raises(InputError, match=r"Says.on_epoch returned True: return None to go on"):
            fit(make_cohort(), *make_loaders(), settings(), callbacks=[Says()])


class TestErrors:
    @pytest.mark.parametrize("method", ["on_epoch", "on_evaluation"])
    def test_keep_their_traceback_and_lose_nothing(self, settings, tmp_path, capsys, method):
        whole, again = make_cohort(), make_cohort()
        fit(whole, *make_loaders(), settings())
        config = settings(folder=str(tmp_path / "broken"))
        with pytest.raises(RuntimeError, match="of the user") as caught:
            fit(make_cohort(), *make_loaders(), config, callbacks=[Breaks(2, method)])
        assert caught.traceback[-1].name == "fail"
        said = capsys.readouterr().err
        assert f"Breaks.{method} raised RuntimeError; all 12 steps are saved: resume goes" in said
        notes = Notes()
        torch.rand(3)
        fit(again, *make_loaders(), config.replace(resume=True), callbacks=[Breaks(2), notes])
        assert kinds(notes) == [("evaluation", 3), ("epoch", 3), ("end", 3)]
        assert same_weights(whole, again)
        assert logged(tmp_path / "broken") == logged(tmp_path / "run")

    def test_at_the_end(self, settings):
        config = settings(epochs=1)
        with pytest.raises(RuntimeError):
            fit(make_cohort(), *make_loaders(), config, callbacks=[Breaks(1, "on_end")])
        notes = Notes()
        result = fit(make_cohort(), *make_loaders(), config.replace(resume=True), callbacks=[notes])
        assert (result.folder / "summary.json").is_file()
        assert notes.events == []

    @pytest.mark.parametrize(
        ("given", "pattern"),
        [
            (Callback(), "callbacks must be a list, not a Callback"),
            ([Callback], "callbacks has the class Callback, which is no callback: give objects"),
            ([print], "callbacks has <built-in function print>, which is no callback"),
        ],
    )
    def test_what_is_no_callback(self, settings, tmp_path, given, pattern):
        with pytest.raises(InputError, match=pattern):
            fit(make_cohort(), *make_loaders(), settings(), callbacks=given)
        assert not (tmp_path / "run").exists()


class Meddles(Callback):
    """Draws from torch's generator, and changes what it is given."""

    def on_epoch(self, event):
        torch.rand(3)
        torch.manual_seed(1)
        event.losses["loss"][:] = [9.0, 9.0]
        event.record.clear()

    def on_evaluation(self, event):
        torch.rand(3)
        event.scores["top1"][:] = [9.0, 9.0]


def test_what_callbacks_do_changes_no_training(settings, tmp_path):
    """Whose peers have dropout. Nor does it tell a resumed run from another."""
    alone, meddled = make_cohort(), make_cohort()
    plain = fit(alone, *make_loaders(), settings(epochs=2))
    folder = str(tmp_path / "meddled")
    result = fit(meddled, *make_loaders(), settings(epochs=2, folder=folder), callbacks=[Meddles()])
    assert same_weights(alone, meddled)
    assert logged(result.folder) == logged(plain.folder)
    for ours, theirs in zip(result.history, plain.history, strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["test"] == theirs["test"]


def test_a_resumed_run_that_was_stopped_says_why_it_does_nothing(settings, caplog):
    fit(make_cohort(), *make_loaders(), settings(), callbacks=[StopsAt(1)])
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(make_cohort(), *make_loaders(), settings(resume=True))
    assert "mutual training stops after epoch 1 of" in caplog.text
    assert "that will do" in caplog.text
