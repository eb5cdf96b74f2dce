"""`fastdml report`: the page of real runs, and every way to ask for it wrongly."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from report_runs import Page, analyses, make_run

from fastdml import cli
from fastdml.analysis import run_analyses
from fastdml.analysis.run import digest
from fastdml.report.analysis_file import ANALYSIS, write_analysis
from fastdml.report.predictions import PREDICTIONS, read_predictions


def written(path) -> Page:
    return Page(path.read_text())


def test_the_page_of_a_real_run(run, tmp_path, capfd):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--to", str(page)]) == 0
    assert capfd.readouterr().out.startswith(f"{page}: ")
    found, summary = written(page), json.loads((run / "summary.json").read_text())
    _, *rows = found.table("Scores on 355 test images")
    for phase, column in (("independent", 1), ("mutual", 2)):
        scores = summary[phase]["scores"]
        shown = [row[column].partition(" | ")[0] for row in rows]
        values = [*scores["top1"], scores["ensemble_top1"]]
        assert shown == [f"{100 * v:.2f}" for v in values]
    mutual = summary["mutual"]["scores"]
    for name, k in (("resnet8-1", 0), ("resnet8-2", 1)):
        assert f"ECE {100 * mutual['ece'][k]:.2f} %, NLL {mutual['nll'][k]:.4f}" in found.text, name
    assert [row[0] for row in found.table("What differs")[1:]] == [
        "subset",
        "independent",
        "epochs",
    ]
    assert dict(found.table("What it ran on"))["command"] == summary["command"]
    assert len(read_predictions(run).label) == 355
    assert [row[0] for row in found.table("Largest gain first")[1:]] != []


def test_the_default_is_in_the_run_or_for_several_here(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert cli.main(["report", "copy"]) == 0
    assert (copy / "report.html").is_file()
    assert cli.main(["report", "copy", str(run)]) == 0
    page = written(tmp_path / "report.html")
    assert len(page.table("Scores of the runs")) == 3
    assert "None: the runs have the same settings." in page.text
    assert cli.main(["report", "copy"]) == 0  # a page that is there is made anew


def test_best_weights_on_demand(run, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--to", str(page), "--weights", "best"]) == 0
    best = json.loads((run / "summary.json").read_text())["mutual"]["best_scores"]
    _, *rows = written(page).table("Scores on")
    assert [row[2].partition(" | ")[0] for row in rows[:2]] == [
        f"{100 * v:.2f}" for v in best["top1"]
    ]
    assert "they flatter" in written(page).text


def test_an_unfinished_run_and_one_without_predictions(unfinished, run, tmp_path):
    assert cli.main(["report", str(unfinished)]) == 0
    assert "This run has not ended" in written(unfinished / "report.html").text
    old = tmp_path / "of an earlier version"
    shutil.copytree(run, old)
    (old / PREDICTIONS).unlink()
    assert cli.main(["report", str(old)]) == 0
    text = written(old / "report.html").text
    assert f"fastdml train digits --resume --folder '{old}' writes it" in text
    assert cli.main(["train", "digits", "--resume", "--folder", str(old)]) == 0
    assert cli.main(["report", str(old)]) == 0
    assert "Confusion" in written(old / "report.html").text


def test_analyses_of_a_run_are_on_its_page(run, tmp_path):
    """Those of its predictions always; those of analysis.json, of both phases, where it is."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    names = ["resnet8-1", "resnet8-2"]
    for folder in (copy, copy / "independent"):
        write_analysis(folder, analyses(names, sha256=digest(folder)))
    assert cli.main(["report", str(copy)]) == 0
    page = written(copy / "report.html")
    assert page.table("Equal answers (%), independent")
    assert page.table("Gains by confidence")
    assert page.table("stage 1, mutual")
    (copy / "independent" / ANALYSIS).write_text("{")
    assert cli.main(["report", str(copy)]) == 0
    page = written(copy / "report.html")
    assert f"{copy / 'independent' / ANALYSIS} is not JSON" in page.text
    assert page.table("stage 1")
    write_analysis(copy, analyses(names))  # of weights that are no longer there
    assert cli.main(["report", str(copy)]) == 0
    assert "stage 1" not in written(copy / "report.html").text


def test_analysing_first(run, tmp_path, monkeypatch):
    """--analyse writes analysis.json of both phases, which the page then shows."""
    copy = shutil.copytree(run, tmp_path / "copy")
    monkeypatch.setattr(run_analyses, "PLANE", 2)
    assert cli.main(["report", str(copy), "--analyse", "--data", str(tmp_path)]) == 0
    page = written(copy / "report.html")
    assert page.table("features, mutual")
    assert (copy / "independent" / ANALYSIS).is_file()


def test_analyses_of_several_runs_are_where_it_says(run, tmp_path, monkeypatch, capfd):
    """The page that compares runs has no room for them."""
    monkeypatch.setattr(run_analyses, "ANALYSES", {"posterior": run_analyses._posterior})
    one, two = (shutil.copytree(run, tmp_path / name) for name in ("one", "two"))
    page = str(tmp_path / "page.html")
    assert cli.main(["report", str(one), str(two), "--analyse", "--to", page]) == 0
    *_, last = capfd.readouterr().out.splitlines()
    assert last == f"analyses are on the page of one run alone: fastdml report {one}"
    assert cli.main(["report", str(one)]) == 0
    assert "How sure the peers are" in written(one / "report.html").text
    assert (two / ANALYSIS).is_file()


def test_own_data_has_no_known_defaults(tmp_path):
    folder = make_run(tmp_path / "run", keep=False)
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings.replace("data: digits", "data: 'own data: x'"))
    assert cli.main(["report", str(folder)]) == 0
    text = written(folder / "report.html").text
    assert "config.replace(resume=True)" in text
    assert "on own data: x" in text


def test_mistakes(refused, run, tmp_path):
    refused(["report"], "the following arguments are required: RUN")
    refused(["report", "nowhere"], "nowhere is not the folder of a run")
    refused(["report", str(run), "--to", str(tmp_path)], "is a folder: give a file")
    refused(["report", str(run), "--to", "x.pdf"], "x.pdf: the page is HTML")
    refused(["report", str(run), "--to", "no/such/x.html"], "cannot write no/such/x.html")
    refused(["report", str(run), "--weights", "first"], "invalid choice")
    refused(["report", str(run), "--data", "."], "give --analyse too")
    refused(["report", str(run), "--open"], "unknown option --open")
    (tmp_path / "own.html").write_text("<p>mine</p>")
    refused(["report", str(run), "--to", "own.html"], "own.html is there already and is no report")
    os.mkfifo(tmp_path / "pipe.html")
    refused(["report", str(run), "--to", "pipe.html"], "is not a file")


@pytest.mark.parametrize("text", ["{}", "data: [1, 2]\n", "data: market1501\nrecipe: [x]\n"])
def test_settings_of_another_kind(tmp_path, text):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text(text)
    assert cli.main(["report", str(folder)]) == 0
    assert written(folder / "report.html").table("Scores on 40")
