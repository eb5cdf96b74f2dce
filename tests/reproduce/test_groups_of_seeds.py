"""Which seeds of a training share a run, where each is found, and what its numbers are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastdml.peer_groups import GROUPS, run_of
from fastdml.reproduce import EXPERIMENTS, SCALES, planning, run_all
from fastdml.reproduce.experiment import PeerOf, Training, trainings_of
from fastdml.reproduce.groups import (
    can_be_grouped,
    most_together,
    runs_of,
    seeds_of_run,
    seeds_together,
)
from fastdml.reproduce.planning import with_seeds_together
from fastdml.reproduce.runner import Runner, jobs_of
from fastdml.reproduce.trainings import Place
from fastdml.yaml_file import CONFIG

PAIR = Training("pair", {"data": "digits", "peers": ("resnet8", "resnet8"), "epochs": 1})
TAUGHT = Training(
    "taught", {"data": "digits", "peers": ("resnet8",), "epochs": 1}, (PeerOf(PAIR, "mutual", 1),)
)


def test_seeds_that_only_choose_weights_can_be_grouped():
    def grouped(scale, *names):
        rows = [row for name in names for row in EXPERIMENTS[name].rows(SCALES[scale])]
        return {training.name: can_be_grouped(training) for training in trainings_of(rows)}

    assert all(grouped("full", "table2", "cohort-size", "ensemble-target").values())
    assert not any(grouped("full", "market").values())
    assert not any(grouped("small", "table2").values())  # the seed chooses the images
    assert not can_be_grouped(TAUGHT)
    assert sum(grouped("full", "semi-supervised").values()) == 0


@pytest.mark.parametrize(
    ("seeds", "most", "expected"),
    [
        ((0, 1, 2), 3, [(0, 1, 2)]),
        ((0, 1, 2), 2, [(0, 1), (2,)]),
        ((0, 1, 2, 3), 3, [(0, 1), (2, 3)]),
        ((0, 2, 3), 9, [(0,), (2, 3)]),
        ((0, 1), 0, [(0,), (1,)]),
        ((), 3, []),
    ],
)
def test_seeds_in_runs_of_consecutive_ones(seeds, most, expected):
    assert runs_of(seeds, most) == expected


def test_as_many_seeds_as_most_of_the_free_memory_takes():
    assert most_together(1e9, 10e9) == 8
    assert most_together(20e9, 10e9) == 1


def begun(folder):
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("")


def test_runs_that_have_begun_stay_as_they_are(tmp_path):
    begun(tmp_path / "pair/seed-1")
    begun(tmp_path / "pair/seeds-4-5")
    (tmp_path / "pair/seeds-6-7").mkdir()  # nothing of a run
    (tmp_path / "pair/seeds-8-x").mkdir()
    assert seeds_of_run(tmp_path / "pair", 1) == (1,)
    assert seeds_of_run(tmp_path / "pair", 5) == (4, 5)
    assert seeds_of_run(tmp_path / "pair", 6) is None
    found = seeds_together([PAIR], range(7), lambda t: tmp_path / t.name, True, lambda t: 9)
    assert found == {
        ("pair", 2): (2, 3),
        ("pair", 3): (2, 3),
        ("pair", 4): (4, 5),
        ("pair", 5): (4, 5),
    }
    found = seeds_together([PAIR], range(7), lambda t: tmp_path / t.name, False, lambda t: 9)
    assert set(found) == {("pair", 4), ("pair", 5)}


def test_runs_that_overlap_are_both_gone_on_with(tmp_path):
    """As of two reproductions at once, of which one trains seeds together: no seed is lost."""
    begun(tmp_path / "trainings/tiny/pair/seed-0")
    begun(tmp_path / "trainings/tiny/pair/seeds-0-1")
    place = with_seeds_together(Place(tmp_path, "tiny", device="cpu"), [PAIR], range(2), None)
    jobs = jobs_of([PAIR], range(2), place)
    assert [str(job) for job in jobs] == ["pair, seed 0", "pair, seeds 0 1"]
    assert [job.folder.name for job in jobs] == ["seed-0", "seeds-0-1"]


def test_seeds_whose_memory_cannot_be_measured_are_trained_one_by_one(tmp_path, monkeypatch):
    """And the estimate says why."""

    def fails(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(planning, "measured", fails)
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 10**10))
    place = Place(tmp_path, "tiny", device="cpu")
    assert with_seeds_together(place, [PAIR], range(3), None).together == {}


def test_one_job_trains_seeds_together_and_their_students_wait_for_it(tmp_path):
    place = Place(tmp_path, "tiny")
    place = with_seeds_together(place, [PAIR, TAUGHT], range(3), True)
    jobs = jobs_of([PAIR, TAUGHT], range(3), place)
    assert [str(job) for job in jobs] == [
        "pair, seeds 0 1 2",
        *(f"taught, seed {seed}" for seed in range(3)),
    ]
    grouped, *taught = jobs
    assert (grouped.config.groups, len(grouped.config.peers), grouped.config.seed) == (3, 6, 0)
    run = tmp_path / "trainings/tiny/pair/seeds-0-2"
    assert grouped.folder == run
    assert place.run_folder(PAIR, 2) == run / GROUPS / "2"
    assert run_of(place.run_folder(PAIR, 2)) == run
    assert taught[1].config.teachers == (f"{run / GROUPS / '1'}:resnet8-2",)
    assert all(need in grouped.keys for job in taught for need in job.needs)
    runner = Runner(jobs, 1, "")
    assert runner.count == 6
    assert "pair, seeds 0 1 2" in runner.plan()
    alone = with_seeds_together(Place(tmp_path, "tiny", device="cpu"), [PAIR], range(3), None)
    assert len(jobs_of([PAIR], range(3), alone)) == 3  # on a CPU a run a seed


@pytest.mark.slow
def test_a_table_of_seeds_trained_together(tmp_path, monkeypatch):
    """Seed 0 has the numbers that it has by itself; the others saw the images in its order."""
    digits = SCALES["digits"]
    short = dataclasses.replace(digits, settings={**digits.settings, "epochs": 1})
    monkeypatch.setitem(SCALES, "digits", short)
    options = {"scale": "digits", "seeds": 2, "device": "cpu"}
    alone, grouped = (
        run_all(["table2:resnet32+resnet32"], folder=tmp_path / str(flag), grouped=flag, **options)
        for flag in (False, True)
    )
    for one, two in zip(alone[0].record.rows, grouped[0].record.rows, strict=True):
        assert one.ours.values[0] == two.ours.values[0]
        assert one.baseline.values[0] == two.baseline.values[0]
        assert None not in two.ours.values
    assert any("trained together" in note for note in grouped[0].record.notes)
    assert not any("trained together" in note for note in alone[0].record.notes)
    assert len({t.seconds for t in grouped[0].record.trainings}) == 1
