"""docs/results.md: every figure of ours in it comes from results/, which comes from its records."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import record, row

from docs import generate, results
from fastdml.reproduce.record import RECORD, Side, read_record
from fastdml.reproduce.results import write_results

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\([^)]*\)")
NAMED = re.compile(r"\b[A-Za-z]+[-_]\d[\d_]*\b|\bTable \d\b")  # CIFAR-100, ResNet-14, Table 2
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?<![.,])")
# Numbers that may stand outside of generated parts: settings, and figures of the paper.
LISTED: dict[str, str] = {}


def loose_numbers(text: str) -> list[str]:
    """Numbers of a page that no script wrote and that are no part of a name, a link or code."""
    text = FENCED.sub("", generate.PART.sub("", text))
    return NUMBER.findall(NAMED.sub("", LINK.sub("]", re.sub(r"`[^`\n]+`", "", text))))


def test_no_figure_of_the_page_is_written_by_hand():
    loose = [number for number in loose_numbers(PAGE.read_text()) if number not in LISTED]
    assert not loose


def test_a_figure_that_is_written_by_hand_is_found():
    text = (
        "ResNet-14 on CIFAR-100 (Table 2) gains 1.25 points, or -3 %, [here](x-9.md), `epochs 8`"
        ".\n\n<!-- generated: results x -->\n7.5\n<!-- end -->\n\n```sh\nfastdml 44\n```\nIn 2,000."
    )
    assert loose_numbers(text) == ["1.25", "-3", "2,000"]


def test_every_result_is_on_the_page():
    shown = set(re.findall(r"<!-- generated: results (\S+) -->", PAGE.read_text()))
    assert {name for _, name in results.records()} <= shown


def test_the_files_of_results_are_what_their_records_make():
    assert [str(path.relative_to(ROOT)) for path in results.outdated()] == []


def test_results_are_small_and_name_no_machine():
    for path in (ROOT / "results").rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 200_000, path.name
        if path.suffix in (".json", ".md", ".csv"):
            found = re.findall(r"(?:^|[\s\"'=])(?:/\w|~/|[A-Z]:\\\\)\S*", path.read_text())
            assert not found, f"{path}: {found}"


def test_the_front_page_has_its_line():
    assert "<!-- generated: results in a line -->\n" in (ROOT / "README.md").read_text()


GAIN = row("2 ResNet-14", series="single", x=2.0, ours=Side("mutual", None, (62.0, 62.5, 61.5)))
OPEN = row("4 ResNet-14", series="single", x=4.0, ours=Side("mutual", None, (61.0, 60.0, 59.7)))
BOTH = row("2 ensembles", series="ensemble", x=2.0)
COHORTS = record(GAIN, OPEN, BOTH, experiment="cohort-size")


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A results/ of two scales of one experiment."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for found in (COHORTS, replace(COHORTS, scale="digits", changes=("digits",))):
        write_results(tmp_path / "results" / found.scale / found.experiment, found)
    return tmp_path / "results"


def test_an_experiment_is_shown_with_all_its_scales(made_up):
    text = results.part("results cohort-size")
    small, digits = (
        text.index("**Scaled down: small: "),
        text.index("**Scaled down: digits: digits."),
    )
    assert small < digits
    assert text.count("A gain: 2 ResNet-14 (+1.83 points, ") == 2
    assert text.count("No difference that 3 seeds can show: 4 ResNet-14 (") == 2
    assert text.count('<img src="../results/small/cohort-size/') == 2
    assert results.part("results market") == "Nobody has run this one yet."


def test_the_page_counts_rows_and_each_training_once(made_up):
    lines = results.part("results in short").splitlines()
    assert lines[2] == "| `cohort-size` | small | 3 | 3 | 2 | 1 | 0 | 0 |"
    other = replace(COHORTS, experiment="entropy")  # of the same trainings
    write_results(made_up / "small" / "entropy", other)
    budget = results.part("results budget").splitlines()
    assert budget[2].startswith(
        "| small | 20,000 of 50,000 training images; 8 epochs in place of 200"
    )
    assert budget[2].endswith("| 3 | 4.5 min | AMD EPYC, 1 thread |")


def test_rows_that_have_no_better_direction_or_no_spread_are_other(made_up):
    neutral, same = replace(GAIN, better=""), replace(OPEN, ours=OPEN.baseline)
    lower = replace(GAIN, better="lower")
    found = replace(COHORTS, rows=(neutral, same, lower))
    write_results(made_up / "small" / "cohort-size", found)
    assert results.in_short().splitlines()[2].endswith("| 3 | 0 | 0 | 1 | 2 |")


def test_how_wide_intervals_are(made_up):
    assert results.intervals().endswith("differences between seeds: 2.48 with 3 seeds.")


def test_the_line_of_the_front_page_is_of_the_larger_scale(made_up):
    line = results.part("results in a line")
    assert "8 epochs in place of 200; 3 seeds" in line
    assert "2 peers +1.83 points (" in line
    assert "4 peers +0.07 points (-" in line
    assert "\n" not in line
    assert line.startswith("Scaled down, ")
    pair = replace(GAIN, label="ResNet-32 + ResNet-32: peer 1, ResNet-32", series="", x=None)
    found = replace(COHORTS, scale="medium", experiment="table2", rows=(pair,))
    write_results(made_up / "medium" / "table2", found)
    assert ": ResNet-32 + ResNet-32, peer 1 +1.83 points (" in results.part("results in a line")


def test_a_file_that_is_out_of_date_is_found_and_written(made_up):
    folder = made_up / "small" / "cohort-size"
    assert not list(results.outdated())
    (folder / "table.md").write_text("better")
    (folder / "curve.png").unlink()
    assert [path.name for path in results.outdated()] == ["table.md", "curve.png"]
    assert results.write_outdated() == ["results/small/cohort-size"]
    assert not list(results.outdated())


def test_a_picture_of_another_record_is_out_of_date(made_up):
    folder = made_up / "small" / "cohort-size"
    picture = (folder / "differences.png").read_bytes()
    write_results(folder, replace(read_record(folder / RECORD), seeds=(0, 1, 5)))
    (folder / "differences.png").write_bytes(picture)
    assert [path.name for path in results.outdated()] == ["differences.png"]


def test_a_record_in_a_folder_of_another_name_is_refused(made_up):
    (made_up / "small" / "cohort-size").rename(made_up / "small" / "table2")
    with pytest.raises(ValueError, match="is of cohort-size at scale small"):
        results.records()
