"""What is trained, in which order and how often, and what a training that fails costs."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny_scale import NAMES, TINY, arguments

import fastdml
from fastdml.cli import main
from fastdml.errors import InputError
from fastdml.reproduce import EXPERIMENTS, child, planning, results, run, run_all, runner
from fastdml.reproduce.experiment import trainings_of
from fastdml.reproduce.scales import SCALES
from fastdml.reproduce.trainings import Place
from fastdml.train.trainer import TrainingDiverged

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")

# Of a run folder: its lock is held, and nothing trained.
HOLD = """
import fcntl, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
lock = (folder / ".lock").open("w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print(flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SCALES, "digits", TINY)
    monkeypatch.setattr(results, "draw", lambda folder, record: [])


@pytest.fixture
def trained(monkeypatch):
    """The runs that are begun or gone on with, in order: folders below trainings/SCALE."""
    began = []
    usual = child.run

    def noting(config, **options):
        began.append("/".join(config.folder.rsplit("/", 2)[1:]))
        return usual(config, **options)

    monkeypatch.setattr(child, "run", noting)
    return began


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a reproduction that has ended, with seed 0 alone."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "digits", TINY)
        patch.setattr(results, "draw", lambda folder, record: [])
        assert main([*arguments_of("reproduce", folder), "--seeds", "1"]) == 0
    return folder


def arguments_of(command, folder, names=NAMES):
    return [command, *arguments(folder, names)]


def record(folder, name):
    return json.loads((folder / "digits" / name / "reproduction.json").read_text())


def test_what_has_ended_is_not_repeated(finished, trained, capsys, caplog):
    before = record(finished, "table2")["rows"]
    assert main([*arguments_of("reproduce", finished), "--seeds", "1"]) == 0
    assert "2 trainings: 2 ended" in caplog.text
    assert trained == []
    assert record(finished, "table2")["rows"] == before
    out = capsys.readouterr().out
    assert "ResNet-8 taught by ResNet-8" in out
    assert "Scaled down" in out


def test_a_row_that_is_asked_for_alone_leaves_the_others_in_the_table(finished, trained, capsys):
    path = finished / "digits/table2/reproduction.json"
    before = json.loads(path.read_text())
    label = next(row.label for row in EXPERIMENTS["table2"].rows(TINY) if "14 + " in row.label)
    earlier = {**before["rows"][0], "label": label}
    path.write_text(json.dumps({**before, "rows": [earlier]}))
    assert main([*arguments_of("reproduce", finished, NAMES[:1]), "--seeds", "1"]) == 0
    assert record(finished, "table2")["rows"] == [*before["rows"], earlier]
    assert label in capsys.readouterr().out
    path.write_text("{")
    assert main([*arguments_of("reproduce", finished, NAMES[:1]), "--seeds", "1"]) == 2
    assert "is no record of a reproduction" in capsys.readouterr().err
    path.unlink()
    assert main([*arguments_of("reproduce", finished, NAMES[:1]), "--seeds", "1"]) == 0
    assert record(finished, "table2")["rows"] == before["rows"]


def test_a_call_from_python_is_told_as_the_command_that_does_the_same(finished):
    (found, _) = run_all(NAMES, scale="digits", folder=finished, seeds=1, device="cpu")
    command = "fastdml reproduce table2:resnet32+resnet32 distillation --scale digits"
    assert found.record.provenance["command"] == f"{command} --seeds 1 --device cpu"


def test_of_several_trainings_at_once_the_end_of_each_is_told(tmp_path, monkeypatch, caplog):
    """Each says what it does in a file of its own."""
    caplog.set_level("INFO")
    monkeypatch.setattr(
        runner, "Child", lambda *_: SimpleNamespace(ended=True, result=lambda: child.Ended())
    )
    row = EXPERIMENTS["entropy"].rows(TINY)[:1]
    jobs = runner.jobs_of(trainings_of(row), range(1), Place(tmp_path, "digits", device="cpu"))
    runner.Runner(jobs, 2, "").run()
    assert caplog.messages == [
        f"{jobs[0]} begins (1 of 1), in {jobs[0].folder}; its progress is in {jobs[0].folder}.log",
        f"{jobs[0]} has ended",
    ]


def test_numbers_are_those_of_the_runs(finished):
    summary = json.loads(
        (finished / "trainings/digits/digits-resnet8-x2/seed-0/summary.json").read_text()
    )
    first, second = record(finished, "table2")["rows"]
    for k, row in enumerate((first, second)):
        for side, phase in (("baseline", "independent"), ("ours", "mutual")):
            assert row[side]["values"] == [100 * summary[phase]["scores"]["top1"][k]]
    one_way = record(finished, "distillation")["rows"][0]["baseline"]
    taught = finished / "trainings/digits/digits-resnet8-distilled/seed-0"
    summary = json.loads((taught / "summary.json").read_text())
    assert one_way["values"] == [100 * summary["mutual"]["scores"]["top1"][0]]
    assert [teacher["name"] for teacher in summary["teachers"]] == ["independent:resnet8-2"]


def test_another_scale_of_images_is_refused_before_anything_is_trained(
    finished, trained, monkeypatch
):
    settings = {**TINY.settings, "subset": 96}
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(TINY, settings=settings))
    with pytest.raises(InputError) as refused:
        run_all(NAMES, scale="digits", folder=finished, seeds=2, device="cpu")
    line = str(refused.value)
    assert "seed-0 holds another training: subset is 64 there and 96 here; delete" in line
    assert "\n" not in line
    assert trained == []


def test_a_folder_of_something_else_is_refused(tmp_path, trained):
    folder = tmp_path / "trainings/digits/digits-resnet8-x2/seed-1"
    folder.mkdir(parents=True)
    (folder / "holiday.txt").write_text("photos")
    remedy = "delete it, or choose another with --folder"
    with pytest.raises(
        InputError, match=f"seed-1 is there already and is not overwritten: {remedy}"
    ):
        run("table2:resnet32+resnet32", scale="digits", folder=tmp_path, device="cpu")
    (folder / "config.yaml").write_text("data: digits\nunlabel")
    with pytest.raises(InputError, match=r"not YAML: .*; delete .*seed-1, or choose another with"):
        run("table2:resnet32+resnet32", scale="digits", folder=tmp_path, device="cpu")
    assert trained == []


def test_a_training_that_fails_costs_no_other(finished, tmp_path, trained, monkeypatch, capsys):
    """Nor what was trained before; and what learns from it waits until it is there."""
    noting = child.run

    def fails(config, **options):
        if config.seed == 0 and len(config.peers) == 2:
            raise TrainingDiverged("the loss is no longer finite: lower lr")
        return noting(config, **options)

    monkeypatch.setattr(child, "run", fails)
    command = arguments_of("reproduce", tmp_path)
    assert main(command) == 2
    assert trained == ["digits-resnet8-x2/seed-1", "digits-resnet8-distilled/seed-1"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is no longer finite: lower lr" in last
    assert last.endswith("the same command tries again")
    ours = record(tmp_path, "table2")["rows"][0]["ours"]["values"]
    one_way = record(tmp_path, "distillation")["rows"][0]["baseline"]["values"]
    assert ours[0] is None
    assert ours[1] > 0
    assert one_way[0] is None
    assert one_way[1] > 0

    monkeypatch.setattr(child, "run", noting)
    trained.clear()
    assert main(command) == 0
    assert trained == ["digits-resnet8-x2/seed-0", "digits-resnet8-distilled/seed-0"]
    again = record(tmp_path, "distillation")["rows"][0]["baseline"]["values"]
    assert again[0] == record(finished, "distillation")["rows"][0]["baseline"]["values"][0]
    assert again[1] == one_way[1]


def test_a_folder_that_another_process_trains_in_is_waited_for(
    tmp_path, trained, monkeypatch, caplog
):
    """Of two reproductions into one folder the second trains what the first does not."""
    monkeypatch.setattr(runner, "PATIENCE", 0.05)
    folder = tmp_path / "trainings/digits/digits-resnet8-x2/seed-0"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "30"], stdout=subprocess.PIPE
    )
    other.stdout.readline()
    waited = []

    def end_the_other(seconds):
        waited.append(list(trained))
        other.kill()
        other.communicate()

    monkeypatch.setattr(runner, "time", SimpleNamespace(sleep=end_the_other))
    run("table2:resnet32+resnet32", scale="digits", folder=tmp_path, seeds=2, device="cpu")
    assert waited == [["digits-resnet8-x2/seed-1"]]
    assert trained == ["digits-resnet8-x2/seed-1", "digits-resnet8-x2/seed-0"]
    assert caplog.text.count("another process trains it") == 1


def test_what_is_measured_on_a_run_is_kept(tmp_path, trained, monkeypatch):
    """Ensembles of some of the peers, and what needs the weights and training images."""
    names = ["cohort-size", "entropy", "flat-minima"]
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(TINY, cohort_sizes=(1, 2, 3)))
    found = run_all(names, scale="digits", folder=tmp_path, seeds=1, device="cpu")
    assert sorted(trained) == ["digits-resnet8-x2/seed-0", "digits-resnet8-x3/seed-0"]
    sizes, entropy, noise = (one.record.rows for one in found)
    largest = tmp_path / "trainings/digits/digits-resnet8-x3/seed-0"
    scores = json.loads((largest / "summary.json").read_text())["independent"]["scores"]
    shares = json.loads((largest / "measured/ensembles-independent.json").read_text())
    assert shares[0] == scores["top1"][0]
    assert shares[2] == scores["ensemble_top1"]
    pairs = [row for row in sizes if row.series == "ensemble" and row.x == 2]
    assert pairs[0].baseline.values == (100 * shares[1],)
    assert sizes[0].baseline.values == sizes[0].ours.values == (100 * scores["top1"][0],)
    assert 0 < entropy[0].ours.values[0] < 2.31  # nats, of ten classes
    assert 10 < entropy[1].ours.values[0] < 100
    assert len(noise) == 3
    assert all(value is not None for row in noise for value in row.ours.values)

    def refuses(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(fastdml.analysis.run, "posterior", refuses)
    monkeypatch.setattr(fastdml.analysis.run, "flat_minima", refuses)
    monkeypatch.setattr("fastdml.reproduce.readings.ensembles", refuses)
    again = run_all(names, scale="digits", folder=tmp_path, seeds=1, device="cpu")
    assert [one.record.rows for one in again] == [one.record.rows for one in found]


def test_a_dry_run_trains_nothing(tmp_path, trained, caplog):
    assert main([*arguments_of("reproduce", tmp_path), "--dry-run"]) == 0
    assert "4 trainings: 0 ended, 4 to begin (digits-resnet8-x2, seeds 0 1; " in caplog.text
    assert trained == []
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tabel2"], "unknown experiment 'tabel2'; did you mean table2?"),
        (["market"], "market has no scale digits"),
        (
            ["table2", "--seeds", "0"],
            "seeds, how many from 0, must be a whole number of at least 1, not 0",
        ),
        (["table2", "--jobs", "0"], "jobs must be a whole number of at least 1, not 0"),
        (["table2", "--price-per-hour", "-1"], "price_per_hour must be 0 or more, not -1.0"),
        (["table2", "--price-per-hour", "nan"], "price_per_hour must be a finite number, not nan"),
        (["table2", "--seedz", "1"], "did you mean --seeds?"),
        ([], "name an experiment; --list shows those there are"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(["reproduce", *words, "--scale", "digits"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("names", "table2", r"a list of experiments, such as \['table2'\], not 'table2'"),
        ("names", [["table2"]], "an experiment is a name, such as 'table2', not "),
        ("names", 2, "a list of experiments"),
        ("names", [], "name an experiment, such as 'table2'"),
        ("scale", SCALES["digits"], "scale must be a name, such as 'small', not Scale"),
        ("scale", None, "scale must be a name"),
        ("seeds", [0, 1], r"seeds, how many from 0, must be a whole .* not \[0, 1\]"),
        ("seeds", "2", "seeds, how many from 0, must be a whole number of at least 1, not '2'"),
        ("seeds", True, "not True"),
        ("jobs", 1.5, "jobs must be a whole number of at least 1, not 1.5"),
        ("root", None, "a path is text or a Path, not None"),
        ("folder", 3, "a path is text or a Path, not 3"),
        ("device", 0, "device"),
        ("device", [0], "device"),
        ("price_per_hour", "3", "price_per_hour must be a finite number, not '3'"),
        ("download", "no", "download must be True or False, not 'no'"),
        ("dry_run", None, "dry_run must be True or False, not None"),
        ("command", 3, "command must be a list of words, not 3"),
        ("grouped", "auto", "grouped must be True or False, not 'auto'"),
    ],
)
def test_arguments_of_another_kind_are_named(name, value, said, tmp_path, trained):
    given = {"names": NAMES, "scale": "digits", "folder": tmp_path / "out", "device": "cpu"}
    with pytest.raises(InputError, match=said) as refused:
        run_all(**{**given, name: value})
    assert "\n" not in str(refused.value)
    assert trained == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", SCALES)
def test_the_list_names_every_row_that_can_be_asked_for(scale, capsys):
    assert main(["reproduce", "--list", "--scale", scale]) == 0
    words = capsys.readouterr().out.split()
    assert words[6] == scale
    for name, experiment in EXPERIMENTS.items():
        assert name in words
        try:
            rows = [f":{row.choice}" for row in experiment.rows(SCALES[scale])]
        except InputError:
            continue
        there = iter(words[words.index(name) :])
        assert all(choice in there for choice in dict.fromkeys(rows))
    assert all(name in words for name in SCALES)


def test_missing_images_are_told_before_anything_is_timed_or_written(tmp_path, capsys, caplog):
    """One line in place of a failure a training; a dry run asks for none."""
    folders = ["--root", str(tmp_path / "none"), "--folder", str(tmp_path / "out")]
    command = ["reproduce", "semi-supervised", "--scale", "smoke", "--seeds", "1", *folders]
    assert main([*command, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == (
        f"fastdml: error: {tmp_path / 'none'}: no such folder: name the one that holds CIFAR-100, "
        "or use --download"
    )
    assert "timing" not in caplog.text
    assert not (tmp_path / "out").exists()
    assert main([*command, "--device", "cpu", "--dry-run"]) == 0
    assert "timing a few steps of cifar100-resnet8-x2-semi" in caplog.text


def test_a_place_that_takes_no_file_is_told_before_anything_is_timed(
    tmp_path, trained, monkeypatch, capsys, caplog
):
    def refused(folder, *options):
        assert main(["reproduce", *arguments(folder), *options]) == 2
        assert "timing" not in caplog.text
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/deeper"):
        for options in ((), ("--dry-run",)):
            assert f"{tmp_path}/file is no folder: choose another" in refused(folder, *options)
    (tmp_path / "out/digits").mkdir(parents=True)
    (tmp_path / "out/digits/table2").write_text("")
    assert "out/digits/table2 is no folder" in refused(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99, before[1]))  # an empty file has its place
    try:
        line = refused(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {tmp_path}/full/trainings/digits: File too large: make room" in line

    def refuses(dir, **options):
        raise PermissionError(13, "Permission denied", f"{dir}/some name")

    monkeypatch.setattr(planning.tempfile, "TemporaryFile", refuses)
    line = refused(tmp_path / "ro")
    assert "ro/trainings/digits: Permission denied: choose another place" in line
    assert "cannot write" in refused(tmp_path / ("x" * 300))
    assert trained == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize("package", ["yaml", "safetensors"])
def test_without_the_extra_for_training_nothing_begins(
    package, tmp_path, trained, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments_of("reproduce", tmp_path / "out")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].endswith(
        f"{package} is not installed: pip install 'fastdml[train]'"
    )
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_market_without_its_images_is_one_line(tmp_path, capsys):
    words = ["reproduce", "market:scratch", "--scale", "full", "--seeds", "1", "--device", "cpu"]
    folders = ["--root", str(tmp_path), "--folder", str(tmp_path / "out")]
    assert main([*words, *folders]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Market-1501" in last
    assert str(tmp_path) in last
