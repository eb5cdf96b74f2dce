"""Rows that are asked for alone leave the others of their table as they are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from made_up import training

from fastdml.errors import InputError
from fastdml.reproduce import EXPERIMENTS, SCALES, trainings
from fastdml.reproduce.earlier_rows import _key, earlier_record, with_earlier_rows
from fastdml.reproduce.experiment import trainings_of
from fastdml.reproduce.record import Record, RowRecord, Side, write_record
from fastdml.reproduce.tables import markdown
from fastdml.reproduce.trainings import LOCK, one_at_a_time

TABLE2, SMALL = EXPERIMENTS["table2"], SCALES["small"]
# Holds a lock until it is told to end.
HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""
FIRST, SECOND = "resnet32+resnet32", "mobilenet+mobilenet"


def made(value, seeds, *choices):
    """The record of rows of Table 2 of which every value is `value` and the seed."""
    rows = TABLE2.chosen(SMALL, choices)
    values = tuple(value + seed for seed in seeds)
    sides = [Side("independent", 68.99, values), Side("mutual", 71.19, values)]
    return Record(
        experiment="table2",
        title=TABLE2.title,
        place=TABLE2.place,
        scale="small",
        changes=SMALL.changes,
        seeds=tuple(seeds),
        rows=tuple(RowRecord(row.label, *sides) for row in rows),
        trainings=tuple(
            training(seed, name=one.name, seconds=value)
            for one in trainings_of(rows)
            for seed in seeds
        ),
        provenance={
            "command": " ".join(["fastdml reproduce table2", *choices]),
            "versions": {},
            "commit": None,
            "device": "a CPU",
            "date": "today",
        },
        notes=(f"Of {value:g}.",),
    )


def test_the_other_rows_stay_whole_and_each_row_keeps_its_seeds():
    earlier = made(10.0, range(3))
    found = with_earlier_rows(made(50.0, range(2), SECOND), earlier, TABLE2, SMALL)
    assert [row.label for row in found.rows] == [row.label for row in earlier.rows]
    assert found.seeds == (0, 1, 2)
    for row, before in zip(found.rows, earlier.rows, strict=True):
        if row.label.startswith("MobileNet + MobileNet"):
            assert row.baseline.values == row.ours.values == (50.0, 51.0, None)
        else:
            assert row == before
    seconds = {(one.name, one.seed): one.seconds for one in found.trainings}
    assert seconds["cifar100-mobilenet-x2", 1] == 50.0
    assert seconds["cifar100-resnet32-x2", 2] == 10.0
    assert ("cifar100-mobilenet-x2", 2) not in seconds  # nothing is of it any more
    assert len(found.trainings) == len(seconds) == 5 * 3 + 2
    assert found.notes == ("Of 50.", "Of 10.")
    text = markdown(found)
    assert f"fastdml reproduce table2\nfastdml reproduce table2 {SECOND}\n" in text
    assert "2 of 3 seeds" in text
    again = with_earlier_rows(made(60.0, range(3), FIRST), found, TABLE2, SMALL)
    assert again.provenance["earlier"] == [
        "fastdml reproduce table2", f"fastdml reproduce table2 {SECOND}",
    ]  # fmt: skip
    assert again.rows[0].ours.values == (60.0, 61.0, 62.0)
    unknown = replace(earlier, provenance={})
    found = with_earlier_rows(made(50.0, range(2), SECOND), unknown, TABLE2, SMALL)
    assert found.provenance["earlier"] == []


def test_of_rows_that_are_asked_for_nothing_earlier_is_left():
    earlier, now = made(10.0, range(3), FIRST), made(50.0, range(2), FIRST)
    assert with_earlier_rows(now, earlier, TABLE2, SMALL) == now
    gone = replace(earlier.rows[0], label="of another version")
    assert with_earlier_rows(now, replace(earlier, rows=(gone,)), TABLE2, SMALL) == now


def test_rows_of_other_settings_or_of_a_damaged_file_are_refused(tmp_path):
    assert earlier_record(tmp_path, TABLE2, SMALL) is None
    write_record(tmp_path / "reproduction.json", made(10.0, range(3)))
    assert earlier_record(tmp_path, TABLE2, SMALL) == made(10.0, range(3))
    longer = replace(SMALL, changes=("40 epochs in place of 200",))
    with pytest.raises(InputError, match=r"has rows of other settings .*8 epochs.* move it away"):
        earlier_record(tmp_path, TABLE2, longer)
    with pytest.raises(InputError, match=r"has results of table2 at scale small, .* move it away"):
        earlier_record(tmp_path, EXPERIMENTS["cifar10"], SMALL)  # whose rows have the same names
    with pytest.raises(InputError, match=r"has results of table2 at scale small"):
        earlier_record(tmp_path, TABLE2, replace(SMALL, name="digits"))
    (tmp_path / "reproduction.json").write_text("{")
    with pytest.raises(InputError, match="is no record of a reproduction"):
        earlier_record(tmp_path, TABLE2, SMALL)


def test_no_two_rows_of_an_experiment_are_taken_for_one():
    for experiment, scale in ((e, s) for e in EXPERIMENTS.values() for s in SCALES.values()):
        if (experiment.name, scale.name) != ("market", "digits"):
            rows = experiment.rows(scale)
            assert len({_key(row) for row in rows}) == len(rows)


def test_results_are_written_one_process_after_the_other(tmp_path, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        said = []
        monkeypatch.setattr(
            trainings.logger, "info", lambda text: said.append(text) or other.stdin.close()
        )
        with one_at_a_time(tmp_path):
            assert said == ["another process writes results: waiting for it"]
            assert other.wait() == 0
    with one_at_a_time(tmp_path):
        assert len(said) == 1
