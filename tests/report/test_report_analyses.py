"""What the page of a run shows of its analyses, and what it makes of an analysis that is none."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import pytest
from report_runs import analyses, make_run, predictions
from test_report_page import EVIL, page_of

from fastdml.analysis import analyse_predictions
from fastdml.report.html.charts import plane_chart
from fastdml.report.html.from_analyses import sections
from fastdml.report.run_files import read_run

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from mutations import altered

NAMES = ["resnet8-1", "resnet8-2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("made") / "run", predictions(N=400))
    alone = dataclasses.replace(predictions(N=400, seed=5), label=predictions(N=400).label)
    make_run(folder / "independent", alone, kl_weight=0.0)
    return folder


@pytest.fixture(scope="module")
def page(run):
    """Of a run with every analysis, of both phases."""
    read = read_run(run)
    alone = read.independent.predictions
    told = {**analyse_predictions(read.predictions, alone), **analyses(NAMES)}
    return page_of(run, analyses=told, alone={**analyse_predictions(alone), **analyses(NAMES)})


def test_agreement(page, run):
    found = read_run(run).predictions
    same = (found.top[0] == found.top[1]).mean()
    head, first, _ = page.table("Equal answers (%), mutual")
    assert head == ["", *NAMES]
    assert first == ["resnet8-1", "–", f"{100 * same:.1f}"]
    assert page.table("Cohen's kappa, independent")
    assert page.table("Errors in common, 1: by chance, mutual")
    oracle = (found.top[:2] == found.label).any(axis=0).mean()
    assert f"Mutual peers: at least one is right on {100 * oracle:.2f} % of the images" in page.text
    assert f"they are {found.disagreement.mean():.4f} nats apart" in page.text


def test_gains_by_confidence(page):
    head, *rows = page.table("Gains by confidence")
    assert head[:3] == ["confidence", "images", "independent (%)"]
    assert head[4:7] == ["gain (points)", "gained", "lost"]
    assert [row[0] for row in rows] == [
        "30–40 %", "40–50 %", "50–60 %", "60–70 %", "70–80 %", "80–90 %", "90–100 %",
    ]  # fmt: skip
    assert all(" to " in row[4] for row in rows)


def test_temperature_scaling_stands_beside_what_it_scales(page):
    text = "scaled: ECE 2.50 %, NLL 0.3750 temperature 1.500 and 1.625"
    assert text in page.text
    assert "the temperature that fits the other half best, of the last weights" in page.text


def test_entropy(page):
    head, first, second, last = page.table("Entropy of the predictions")
    assert head[1:3] == ["mutual entropy (nats)", "mutual top-1 (%)"]
    assert first == ["resnet8-1", "0.5000", "75.00", "0.5000", "75.00"]
    assert (second[1], last[0], last[2]) == ("0.6250", "ensemble", "68.75")
    assert "on 1,234 training images, of the last weights" in page.text


def test_flat_minima(page):
    head, *rows = page.table("Rise of the loss (nats)")
    assert head == ["noise", *(f"{n}, {p}" for p in ("mutual", "independent") for n in NAMES)]
    assert rows[0][:2] == ["0", "0"]
    assert rows[2][:2] == ["0.25", "0.25 ± 0.02"]
    assert "Mean of 5 draws on 1,234 training images" in page.text
    assert "a filter" in page.text


def test_loss_sections(page):
    head, *rows = page.table("resnet8-1 to resnet8-2: loss (nats)")
    assert head == ["0: the first, 1: the second", "mutual", "independent"]
    assert rows[0] == ["-0.25", "2.25", "2.25"]
    assert [row[1] for row in page.table("resnet8-1 to resnet8-2: accuracy (%)")[1:]] == [
        "87.5"
    ] * 5
    assert "Between resnet8-1 and resnet8-2, mutual, the loss rises at most 0.062" in page.text


def test_loss_planes(page):
    _, *rows = page.table("Loss, mutual: from 0.125, pale, to 4.625 nats, dark")
    assert rows[0] == ["-0.5", "0.625", "0.375", "0.625", "1.375", "2.625"]
    cells = [a for tag, a in page.tags if a.get("class") == "cell"]
    assert len(cells) == 2 * 25
    shades = [float(cell["fill-opacity"]) for cell in cells[:25]]
    assert min(shades) == shades[6] == 0  # the lowest loss
    assert max(shades) == shades[-1] == 0.9
    assert sum(tag == "g" and a.get("class") == "c1 m1 marked" for tag, a in page.tags) == 2


def test_alignment(page):
    assert page.table("stage 1, mutual")[2] == ["resnet8-2", "0.375", "–"]
    assert page.table("stage 2, independent")


def test_a_page_without_analyses_has_none_of_it(run):
    page = page_of(run)
    for word in ("Flatness", "Where the peers agree", "scaled", "By confidence", "Loss plane"):
        assert word not in page.text
    assert page_of(run, analyses={"of a later version": [1]}).source == page.source


def test_one_phase_alone(run, tmp_path):
    page = page_of(run, analyses=analyses(NAMES))
    assert page.table("stage 1")
    assert page.table("Rise of the loss (nats)")[0] == ["noise", *NAMES]
    page = page_of(run, alone=analyses(NAMES))
    assert page.table("Entropy of the predictions")[0] == ["peer", "entropy (nats)", "top-1 (%)"]
    inner = page_of(run / "independent", analyses=analyses(NAMES))
    assert inner.table("stage 1")


def test_one_peer_and_many(tmp_path):
    run = make_run(tmp_path / "one", predictions(K=1, peers=["a"]))
    found = {**analyse_predictions(read_run(run).predictions), **analyses(["a"])}
    page = page_of(run, analyses=found)
    assert page.table("Entropy of the predictions")[1][0] == "a"
    assert "Where the peers agree" not in page.text
    names = [f"peer {k}" for k in range(9)]
    run = make_run(tmp_path / "many", predictions(K=9, peers=names))
    found = analyses(names, layers=20, side=101)
    page = page_of(run, analyses={**analyse_predictions(read_run(run).predictions), **found})
    assert "stage 9" in page.tables
    assert "stage 8" not in page.tables  # the last twelve
    assert "2 more pairs are in analysis.json" in page.text
    assert len(page.table("Loss: from")) == 1 + 34
    assert len(page.source.encode()) < 1_000_000


# --- analyses that are none ---


def test_names_stay_text(tmp_path):
    names = [EVIL, '"><svg onload=alert(1)>']
    run = make_run(tmp_path / "run", predictions(peers=names))
    found = {**analyse_predictions(read_run(run).predictions), **analyses(names)}
    found["kernel_alignment"]["layers"][0] = "</table><script>"
    page = page_of(run, analyses=found)
    assert "</table><script>" in page.text


def test_what_is_of_another_form_is_left_out_in_one_line(run):
    read, good = read_run(run), analyses(NAMES)
    for name, broken in (
        ("flat_minima", {**good["flat_minima"], "loss": [[1, 2]]}),
        ("flat_minima", {**good["flat_minima"], "scales": [0.1, 0.0, 0.2]}),
        ("posterior", {**good["posterior"], "peers": ["a", "b", "c"]}),
        ("posterior", "text"),
        ("loss_plane", {**good["loss_plane"], "x": [0.0]}),
        ("loss_section", []),
        ("kernel_alignment", {**good["kernel_alignment"], "alignment": None}),
        ("temperature_scaling", {}),
        ("peer_agreement", {"peers": NAMES}),
        ("gains_by_confidence", {"groups": [[]]}),
        ("gains_by_noise", {"groups": ["right label"], "images": ["x"]}),
    ):
        made, (line,) = sections(read, {**good, name: broken}, {})
        assert line.startswith(f"analysis.json: {name} is not as expected (")
        assert line.endswith("): left out")
        shown = {key for key, value in made.items() if value}
        assert len(shown) == len(good) - (name in good)
    page = page_of(run, analyses={**good, "posterior": 1})
    assert "analysis.json: posterior is not as expected (" in page.text


def test_missing_numbers_are_dashes(run):
    good = analyses(NAMES)
    good["kernel_alignment"]["alignment"] = [[[None, None], [0.5, None]]] * 2
    good["flat_minima"]["loss"][1] = [0.5, None, 1.0]
    good["posterior"]["entropy"][1] = None
    page = page_of(run, analyses=good)
    assert page.table("stage 1")[1:] == [[NAMES[0], "–", "–"], [NAMES[1], "0.500", "–"]]
    assert [row[2] for row in page.table("Rise of the loss")[1:]] == ["0", "– ± 0.01", "0.5 ± 0.02"]
    assert page.table("Entropy of the predictions")[2][1] == "–"


def test_anything_anywhere_is_shown_or_named(run):
    """Values of other kinds, sizes and signs, in any place."""
    read = read_run(run)
    good = {**analyse_predictions(read.predictions, read.predictions), **analyses(NAMES)}
    draws, left_out = random.Random(0), 0
    for turn in range(150):
        found = good
        for _ in range(draws.randint(1, 3)):
            found = altered(draws, found)
        found = found if isinstance(found, dict) else {"posterior": found}
        _, problems = sections(read, found, found)
        left_out += len(problems)
        if turn % 50 == 0:
            page_of(run, analyses=found, alone=found)
    assert left_out > 40


def test_a_plane_of_one_value():
    chart = plane_chart(
        "p", "t", "d", [0, 1], [0, 1], [[0.0, None], [0.0, 0.0]], [("a", "c0 m0", 9, 9)]
    )
    assert chart.count("<rect") == 3
    assert "marked" not in chart  # it lies outside
