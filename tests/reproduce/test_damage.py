"""Files of a reproduction that were damaged, and errors that nobody foresaw, cost themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal

import pytest
from tiny_scale import NAMES, TINY

from fastdml.cli import main
from fastdml.reproduce import child, provenance, results, trainings
from fastdml.reproduce.experiment import Training
from fastdml.reproduce.scales import SCALES
from fastdml.reproduce.trainings import Finished, is_locked, state_of
from fastdml.train.config.sources import load_config
from fastdml.train.run_folder import LOCK

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")

PAIR = "trainings/digits/digits-resnet8-x2/seed-0"
DAMAGED = ["", "{", "null", "[1]", "3", "{}", '{"mutual": 3, "independent": 4}']


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(TINY, seeds=1))
    monkeypatch.setattr(results, "draw", lambda folder, record: [])


def reproduce(folder, *names):
    places = ["--scale", "digits", "--folder", str(folder), "--device", "cpu"]
    return main(["reproduce", *(names or NAMES[:1]), *places])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "digits", dataclasses.replace(TINY, seeds=1))
        patch.setattr(results, "draw", lambda folder, record: [])
        assert reproduce(folder) == 0
    return folder


def rows(folder):
    return json.loads((folder / "digits/table2/reproduction.json").read_text())["rows"]


def test_a_run_killed_before_its_first_checkpoint_can_be_killed_again(
    finished, tmp_path, monkeypatch
):
    """Nothing is noted in its folder that a run begun anew would be refused for."""
    folder = tmp_path / "seed-0"
    folder.mkdir()
    shutil.copy(finished / PAIR / "config.yaml", folder)
    config = load_config(folder / "config.yaml").replace(folder=str(folder), resume=True)
    monkeypatch.setattr(provenance, "commit", lambda: "a" * 40)
    with monkeypatch.context() as killed:
        killed.setattr(child, "run", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            child.train_here(config, "")
    assert child.train_here(config, "") == child.Ended()
    assert provenance.commits(folder) == ("a" * 40,)


def test_a_damaged_summary_is_that_of_a_run_to_go_on_with(finished, tmp_path):
    """Which writes it again, and the table is the same."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    config = load_config(folder / PAIR / "config.yaml").replace(folder=str(folder / PAIR))
    assert state_of(config) == "finished"
    path = folder / PAIR / "summary.json"
    whole = json.loads(path.read_text())
    no_scores = json.dumps({**whole, "mutual": {**whole["mutual"], "scores": [1]}})
    for damaged in (*DAMAGED, no_scores):
        path.write_text(damaged)
        assert state_of(config) == "begun", damaged
    assert reproduce(folder) == 0
    assert rows(folder) == rows(finished)


def test_a_damaged_measurement_is_measured_again(tmp_path):
    measured = []

    def measure():
        measured.append(True)
        return {"loss": [0.5, 0.25]}

    run = Finished(Training("pair", {}), 0, tmp_path)

    def read():
        return run.measured("noise", "mutual", measure, lambda found: found["loss"][1])

    for times, damaged in enumerate((*DAMAGED, '{"loss": [1]}', '{"loss": ["a", "b"]}'), 1):
        (tmp_path / "measured").mkdir(exist_ok=True)
        (tmp_path / "measured/noise-mutual.json").write_text(damaged)
        assert (read(), read(), len(measured)) == (0.25, 0.25, times)


def test_a_training_that_fails_by_any_error_costs_no_other(tmp_path, monkeypatch, capsys):
    """Its traceback is kept beside its folder."""

    def fails(config, **options):
        raise ZeroDivisionError("of a\nseed")

    monkeypatch.setattr(child, "run", fails)
    monkeypatch.setitem(SCALES, "digits", TINY)
    assert reproduce(tmp_path) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "seed 0: ZeroDivisionError: of a seed; " in line
    assert "seed-0.log has all of it, and 1 more; the same command tries again" in line
    for seed in (0, 1):
        log = tmp_path / f"trainings/digits/digits-resnet8-x2/seed-{seed}.log"
        assert log.read_text().count("in fails\n") == 1
    assert rows(tmp_path)[0]["ours"]["values"] == [None, None]


def test_a_number_that_cannot_be_read_costs_no_other(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    usual = Finished.scores

    def fails(run, phase):
        return {} if phase == "mutual" else usual(run, phase)

    monkeypatch.setattr(Finished, "scores", fails)
    assert reproduce(folder) == 2
    assert "seed 0: KeyError: 'top1'; " in capsys.readouterr().err.splitlines()[-1]
    assert "KeyError: 'top1'" in (folder / f"{PAIR}.log").read_text()
    assert [row["ours"]["values"] for row in rows(folder)] == [[None], [None]]
    assert [row["baseline"] for row in rows(folder)] == [row["baseline"] for row in rows(finished)]


def test_a_lock_that_may_not_be_opened_is_nobodys(tmp_path, monkeypatch):
    """Waiting for it would not end: the training itself says what is wrong."""

    def refuses(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(trainings.Path, "open", refuses)
    assert (tmp_path / LOCK).parent.is_dir()
    assert not is_locked(tmp_path)
