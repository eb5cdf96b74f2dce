"""The page of a run and of several: what it says is what the folder holds, whatever it holds."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from report_runs import Page, make_retrieval_run, make_run, predictions, scores

from fastdml.errors import InputError
from fastdml.report.html.comparison_page import comparison_page
from fastdml.report.html.run_page import run_page
from fastdml.report.metrics_log import MetricsLog
from fastdml.report.predictions import PREDICTIONS
from fastdml.report.run_files import read_run
from fastdml.report.statistics import (
    binomial_interval,
    calibration,
    class_accuracy,
    confusion,
    paired_interval,
)
from fastdml.train.config.sources import preset
from fastdml.train.tasks import classification, reid

SCORING = classification.SCORING


def page_of(folder, **options) -> Page:
    page = Page(run_page(read_run(folder), options.pop("scoring", SCORING), **options))
    check_form(page)
    return page


def check_form(page: Page) -> None:
    """What holds for every page: nothing from elsewhere, ids once, links and labels that lead
    somewhere, headings in order, tables with captions, pictures with descriptions."""
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href"):
            address = attributes.get(name) or "#main"
            assert address.startswith(("#", "data:")), address
            if address.startswith("#"):
                assert address[1:] in ids, address
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    count = [tag for tag, _ in page.tags].count
    assert count("table") == count("caption")
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
    assert "url(" not in page.source
    assert "@import" not in page.source


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run and its independent run, each with predictions of the same images."""
    folder = make_run(tmp_path_factory.mktemp("made") / "run", independent=True)
    alone = dataclasses.replace(predictions(seed=5), label=predictions().label)
    make_run(folder / "independent", alone, kl_weight=0.0)
    summary = json.loads((folder / "summary.json").read_text())
    inner = json.loads((folder / "independent" / "summary.json").read_text())
    summary["independent"] = inner["mutual"]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_table_has_the_summarys_scores_and_their_intervals(run):
    page = page_of(run)
    found = json.loads((run / "summary.json").read_text())
    head, *rows = page.table("Scores on 40 test images")
    assert head[:4] == ["peer", "independent top-1 (%)", "mutual top-1 (%)", "gain (points)"]
    for k, row in enumerate(rows):
        both = [
            [*found[phase]["scores"]["top1"], found[phase]["scores"]["ensemble_top1"]][k]
            for phase in ("independent", "mutual")
        ]
        for cell, value in zip(row[1:3], both, strict=True):
            text, _, interval = cell.partition(" | ")
            assert text == percent(value)
            low, high = (float(x) for x in interval.split("–"))
            assert (low, high) == pytest.approx(
                [100 * v for v in binomial_interval(value, 40)], abs=0.006
            )
        gain = float(row[3].partition(" | ")[0].replace("−", "-"))
        assert gain == pytest.approx(100 * (both[1] - both[0]), abs=0.006)
    assert [row[0] for row in rows] == ["resnet8-1", "resnet8-2", "ensemble"]
    assert rows[0][-1] == "1,000"


def test_gains_by_class_are_recomputed(run):
    ours, alone = (read_run(f).predictions for f in (run, run / "independent"))
    before, after = (class_accuracy(p)[:2].mean(axis=0) for p in (alone, ours))
    _, *rows = page_of(run).table("Largest gain first")
    assert {row[0] for row in rows} == {"class 0", "class 1", "class 2"}
    gains = []
    right = [p.top[:2] == p.label for p in (alone, ours)]
    for name, images, a, b, gain, gained, lost, _ in rows:
        c = int(name[-1])
        was, now = (hits[:, ours.label == c] for hits in right)
        assert (int(gained), int(lost)) == ((now & ~was).sum(), (was & ~now).sum())
        gain, _, interval = gain.partition(" | ")
        low, high = (float(v.replace("−", "-")) for v in interval.split(" to "))
        expected = paired_interval(now.mean(axis=0), was.mean(axis=0))
        assert (low, high) == pytest.approx([100 * v for v in expected], abs=0.051)
        assert int(images) == (ours.label == c).sum()
        assert (a, b) == (f"{100 * before[c]:.1f}", f"{100 * after[c]:.1f}")
        gains.append(float(gain.replace("−", "-")))
        assert gains[-1] == pytest.approx(100 * (after[c] - before[c]), abs=0.051)
    assert gains == sorted(gains, reverse=True)


def test_confusion_and_calibration_are_recomputed(run):
    page, found = page_of(run), read_run(run).predictions
    _, *rows = page.table("Number of images")
    shown = [[int(cell or 0) for cell in row[1:]] for row in rows]
    assert shown == confusion(found).tolist()
    for row in range(3):
        of = calibration(found, row)
        assert f"ECE {100 * of.ece:.2f} %, NLL {of.nll:.4f}" in page.text
    _, *bins = page.table("resnet8-1")
    assert [int(b[1]) for b in bins] == [part.images for part in calibration(found, 0).bins]


def test_pictures_are_the_stored_ones_with_what_peers_say(run):
    image = pytest.importorskip("PIL.Image")
    page, found = page_of(run), read_run(run).predictions
    shown = [a for tag, a in page.tags if tag == "img"]
    assert len(shown) == len(found.pictured) == 4
    for k, attributes in enumerate(shown):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(image.open(io.BytesIO(data))), found.pictures[k])
        assert attributes["alt"] == f"Test image {k}, of class {found.class_name(found.label[k])}"
        says = page.table(f"What is said of image {k}")
        assert [row[2] for row in says] == [f"{100 * p:.1f} %" for p in found.confidence[:, k]]
        marks = ["✓" if t == found.label[k] else "✗" for t in found.top[:, k]]
        assert [row[1][0] for row in says] == marks


def test_pictures_of_files_have_the_names_of_these(tmp_path):
    files = ("a cat/1.png", "b/<i>2</i>.png", "é/\udcff.png", "c/image 4.png")
    found = dataclasses.replace(predictions(), files=files)
    page = page_of(make_run(tmp_path / "run", found))
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alts[0].startswith("Test image a cat/1.png, of class")
    assert alts[3].startswith("Test image c/image 4.png, of class")
    assert page.table("What is said of b/<i>2</i>.png")
    assert "image 0" not in page.text


def test_curves_have_their_values_in_tables(run):
    head, *rows = page_of(run).table("Test accuracy (%)")
    assert head == [
        "epoch", "resnet8-1, mutual", "resnet8-2, mutual", "ensemble, mutual",
        "resnet8-1, independent", "resnet8-2, independent", "ensemble, independent",
    ]  # fmt: skip
    top1 = scores(read_run(run).predictions)["top1"]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[-1][1:3] == [f"{100 * v:.4g}" for v in top1]
    _, *losses = page_of(run).table("Training cross-entropy")
    assert [row[1] for row in losses] == ["1", "0.5", "0.3333"]
    _, *speed = page_of(run).table("Images a second")
    assert [row[1] for row in speed] == ["1,001", "1,002", "1,003"]


@pytest.mark.parametrize(("epochs", "told"), [(3, False), (12, True)])
def test_the_last_reading_is_told_where_it_is_no_span_of_its_own(tmp_path, epochs, told):
    text = page_of(make_run(tmp_path / "run", epochs=epochs)).text
    assert (f"last reading, epoch {epochs}" in text) == told


def test_words_say_which_weights_and_what_one_seed_cannot_tell(run):
    text = page_of(run).text
    assert "on 40 test images; each by itself, from the same start on the same batches" in text
    assert "the weights after the last epoch, which no score has chosen" in text
    assert "one run from one seed (0)" in text
    assert "not how far another seed would" in text
    page = page_of(run, weights="best")
    assert "independent (%)" in page.table("Largest gain first")[0]
    assert "to" not in page.table("Scores on")[1][3]  # no interval: those are of the last weights
    text = page.text
    assert "the best of 3 evaluations on these same test images: they flatter" in text


def test_weights_that_validation_chose_are_shown_by_default(tmp_path):
    found = predictions(weights="best")
    run = make_run(
        tmp_path / "a", found, evaluated="validation", summary={"chosen_on": "validation"}
    )
    text = page_of(run).text
    assert "the weights of epoch 2, chosen on validation images; the test images were read" in text
    assert "Validation accuracy (%)" in text
    assert "of the best weights" in text
    last = page_of(run, weights="last").text
    assert "the weights after the last epoch" in last
    both = {"chosen_on": "validation", "scored_on": "validation"}
    run = make_run(tmp_path / "b", found, evaluated="validation", summary=both)
    text = page_of(run).text
    assert "there is no test set: they flatter" in text
    assert "The validation images with the largest divergence" in text


@pytest.mark.parametrize(("epochs", "said"), [(2, "best"), (3, "last")])
def test_the_last_weights_are_the_best_where_the_last_epoch_is(tmp_path, epochs, said):
    """Without a test set what is kept is of the last weights, and validation chose epoch 2."""
    both = {"chosen_on": "validation", "scored_on": "validation"}
    run = make_run(tmp_path / "run", epochs=epochs, evaluated="validation", summary=both)
    text = page_of(run).text
    assert f"Validation images, of the {said} weights" in text
    assert ("while the table above is of the best ones" in text) == (said == "last")


def test_settings_that_differ_are_marked(run):
    defaults = preset("digits").to_dict()
    _, *rows = page_of(run, defaults=defaults).table("What differs")
    assert {row[0]: row[2] for row in rows} == {"epochs": "20", "independent": "no"}
    assert "changed" in rows[0][1]
    every = page_of(run, defaults=defaults).table("All settings")
    assert {row[0] for row in every[1:]} == set(defaults)
    assert "What differs" not in page_of(run).text  # nobody knows the defaults of own data


def test_the_environment_is_there(run):
    rows = dict(page_of(run).table("What it ran on"))
    assert rows["device"] == "CPU of a test"
    assert rows["command"] == "fastdml train digits"
    assert "version of torch" in rows
    assert rows["ended"].startswith("20")


# --- runs that lack something ---


def test_an_unfinished_run_says_so(tmp_path):
    run = make_run(tmp_path / "run", epochs=2, ended=False, keep=False)
    (run / "config.yaml").write_text("data: digits\nepochs: 7\n")
    page = page_of(run, remedy="It comes when the run ends.")
    assert "This run has not ended: it stands at epoch 2 of 7." in page.text
    assert "the last evaluation so far" in page.text
    assert "no predictions.npz" in page.text
    assert page.table("Scores on 40 test images")


def test_a_run_without_evaluation(tmp_path):
    run = make_run(tmp_path / "run", evaluated="", keep=False)
    page = page_of(run)
    assert "Nothing was evaluated" in page.text
    assert page.table("Training KL")


def test_a_run_of_an_earlier_version_says_how_to_get_the_rest(tmp_path):
    run = make_run(tmp_path / "run", keep=False)
    page = page_of(run, remedy="fastdml train digits --resume --folder 'a b' writes it")
    assert "fastdml train digits --resume --folder 'a b' writes it" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_a_run_that_has_logged_nothing(tmp_path):
    run = make_run(tmp_path / "run", epochs=0, evaluated="", ended=False, keep=False)
    page = page_of(run)
    assert "it has logged nothing yet" in page.text
    assert "svg" not in {tag for tag, _ in page.tags} or "Nothing has been logged yet" in page.text


def test_one_peer(tmp_path):
    run = make_run(tmp_path / "run", predictions(K=1, peers=["resnet8"]))
    page = page_of(run)
    assert "One peer, trained from the labels alone" in page.text
    assert "Hardest class first" in page.tables
    assert "Hardest images" in page.text
    assert "ensemble" not in page.text.lower().replace("ensemble: ", "")


@pytest.mark.parametrize("K", [1, 2])
def test_peers_with_a_teacher(tmp_path, K):
    """The page names it, and says whom the peers learnt from and what the KL term is of."""
    peers = [f"resnet8-{k + 1}" for k in range(K)]
    teachers = {"teachers": [{"name": "big:resnet20", "source": "runs/big"}]}
    run = make_run(tmp_path / "run", predictions(K=K, peers=peers), summary=teachers)
    make_run(run / "independent", predictions(K=K, peers=peers), kl_weight=0.0)
    with MetricsLog(run, peers, tensorboard=False, resume_step=30) as log:
        values = {"kl": [0.1] * K, "teacher_kl/big:resnet20": [0.2] * K}
        log.log("train", 40, 4, **values)
        log.log("epoch", 40, 4, **values)
    page = page_of(run)
    how = "One peer" if K == 1 else "Trained together on digits"
    others = "" if K == 1 else "from each other and "
    assert f"{how}, taught by big:resnet20" in page.text
    assert "labels alone" not in page.text
    assert f"Learning {others}from teachers changed that by" in page.text
    assert f"Training KL from {'' if K == 1 else 'the other peers and '}the teachers" in page.text


def test_many_peers_and_a_thousand_classes(tmp_path):
    peers = [f"resnet8-{k + 1}" for k in range(9)]
    run = make_run(tmp_path / "run", predictions(K=9, N=3000, C=1000, peers=peers))
    page = page_of(run)
    assert "Number of images" not in page.tables
    assert len(page.table("Classes taken for another")) == 31
    assert len(page.table("Largest gain first")) == 1 + 24 + 1
    assert len(page.table("Every class")) == 1001
    assert "the peers reach a mean of " in page.text
    assert len(page.source) < 2_000_000


def test_a_hundred_classes_stay_below_two_megabytes(tmp_path):
    found = predictions(K=3, N=10_000, C=100, peers=list("abc"), pictures=24)
    run = make_run(tmp_path / "run", found, epochs=200)
    assert len(page_of(run).source.encode()) < 2_000_000


def test_long_runs_are_thinned_evenly(tmp_path):
    run = make_run(tmp_path / "run", epochs=700)
    _, *rows = page_of(run).table("Training cross-entropy")
    assert len(rows) == 240
    assert (rows[0][0], rows[-1][0]) == ("1", "700")


EVIL = "<script>alert(1)</script>\"'&amp;\u202eلا\u2066日本"


def test_hostile_names_stay_text(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)> \"'&"
    names = [EVIL, '"><svg onload=alert(1)>']
    found = predictions(peers=names, classes=[EVIL, "</table>", "{{ 7 * 7 }}"])
    run = make_run(folder, found, summary={"command": EVIL, "versions": {EVIL: EVIL}})
    (run / "config.yaml").write_text(f"data: {json.dumps(EVIL)}\nx: '</td><script>'\n")
    page = page_of(run, defaults={"x": EVIL}, remedy=EVIL)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert [a for t, a in page.tags if t == "img" and "onerror" in a] == []
    assert "<script>alert(1)</script>\"'&amp;" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.source
    assert "\u2066" not in page.source
    assert "لا" in page.text


def test_values_of_the_wrong_kind_are_no_numbers(tmp_path):
    """A summary that somebody edited, with anything anywhere."""
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    wrongs = ("text", -1, [["a"]], {}, 1e308, 10**400, [1], None, True)
    mutual = summary["mutual"]
    places = [((), summary), (("mutual",), mutual), (("mutual", "scores"), mutual["scores"])]
    for path, values in places:
        for number, name in enumerate([*values, *values]):
            changed = {**values, name: wrongs[number % len(wrongs)]}
            for key in reversed(path):
                changed = {key: changed} if key == "scores" else {**summary, key: changed}
            (run / "summary.json").write_text(json.dumps(changed))
            page_of(run)


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", PREDICTIONS])
def test_a_damaged_file_is_named_and_left_out(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(b"\xff\x00{")
    page = page_of(run)
    assert "Some files could not be read." in page.text
    assert name in page.text


def test_predictions_of_other_peers_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    other = make_run(tmp_path / "other", predictions(peers=["a", "b"]))
    shutil.copy(other / PREDICTIONS, run / PREDICTIONS)
    page = page_of(run)
    assert "is of other peers: left out" in page.text
    assert "Confusion" not in page.text


def test_not_a_run(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a run"):
        read_run(tmp_path)


def test_a_retrieval_run(tmp_path):
    page = page_of(make_retrieval_run(tmp_path / "run"), scoring=reid.SCORING)
    head, first, *_ = page.table("Scores on 3,368 queries")
    cells = {name: cell.partition(" | ") for name, cell in zip(head, first, strict=True)}
    assert cells["mutual mAP (%)"] == ("62.00", "", "")  # no share, so no interval
    assert cells["independent rank-1 (%)"][0] == "80.00"
    assert cells["mutual rank-1 (%)"][0] == "82.00"
    low, high = (float(v) for v in cells["mutual rank-1 (%)"][2].split("–"))
    assert (low / 100, high / 100) == pytest.approx(binomial_interval(0.82, 3368), abs=6e-5)
    assert cells["mutual mINP (%)"][0] == "32.00"
    assert cells["mutual TPR at FPR 1e-4 (%)"][0] == "50.00"
    assert "mutual rank-20 (%)" not in head
    assert page.table("Queries with a match") == [
        ["rank", "resnet50-1", "resnet50-2", "ensemble"],
        ["1", "82", "83", "85"],
        ["5", "92", "93", "95"],
    ]
    assert page.table("Training loss on features")
    for word in ("Confusion", "Calibration", "predictions.npz", "images with"):
        assert word not in page.text


# --- several runs ---


def compare(*folders) -> Page:
    runs = [read_run(folder) for folder in folders]
    page = Page(comparison_page(runs, [SCORING] * len(runs)))
    check_form(page)
    return page


def test_seeds_give_mean_and_spread(tmp_path):
    values = []
    for seed in range(3):
        found = predictions(seed=seed)
        make_run(tmp_path / f"run{seed}", found, seed=seed)
        values.append(float((found.top == found.label)[:2].mean()))
    page = compare(*(tmp_path / f"run{seed}" for seed in range(3)))
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert f"top-1, mean of the peers: {percent(mean)} ± {percent(spread)} %" in page.text
    _, *rows = page.table("Only what is not the same")
    assert rows == [["seed", "0", "1", "2"]]
    _, *rows = page.table("Scores of the runs")
    assert [row[5] for row in rows] == [percent(v) for v in values]
    assert len(page.table("Mean of the peers: training cross")[0]) == 4


def test_runs_on_other_images_are_no_seeds(tmp_path):
    for seed, root in enumerate(("photos", "other photos")):
        run = make_run(tmp_path / root, seed=seed)
        text = f"data: folder\nroot: {tmp_path / root}\nseed: {seed}\n"
        (run / "config.yaml").write_text(text)
    page = compare(tmp_path / "photos", tmp_path / "other photos")
    assert "standard deviation" not in page.text
    assert [row[0] for row in page.table("Only what is not the same")[1:]] == ["root", "seed"]
    _, *rows = page.table("Scores of the runs")
    assert [row[1] for row in rows] == ["the images of photos", "the images of other photos"]


def test_a_comparison_says_which_images_the_scores_are_of(tmp_path):
    make_run(tmp_path / "a", seed=0)
    both = {"chosen_on": "validation", "scored_on": "validation"}
    make_run(tmp_path / "b", evaluated="validation", summary=both, seed=1)
    page = compare(tmp_path / "a", tmp_path / "b")
    _, *rows = page.table("Scores of the runs")
    assert [row[4] for row in rows] == ["40 test images", "40 validation images"]
    assert "standard deviation" not in page.text
    assert page.table("Mean of the peers: test and validation accuracy (%)")
    page = compare(tmp_path / "a", tmp_path / "a")
    assert page.table("Ensemble: test accuracy (%)")


def test_other_differences_are_no_seeds(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, lr=0.5)
    make_run(tmp_path / "deep" / "a", seed=2, ended=False)
    page = compare(tmp_path / "a", tmp_path / "b", tmp_path / "deep" / "a")
    assert "standard deviation" not in page.text
    assert [row[0] for row in page.table("Only what is not the same")[1:]] == ["lr", "seed"]
    _, *rows = page.table("Scores of the runs")
    assert [row[0] for row in rows] == ["a-1", "b", "a-2"]
    assert "not ended" in rows[2][-3]
    assert [row[3] for row in rows] == ["last", "last", "of the last evaluation so far"]


def test_runs_of_two_tasks(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", evaluated="", keep=False)
    runs = [read_run(tmp_path / name) for name in "ab"]
    page = Page(comparison_page(runs, [SCORING, reid.SCORING]))
    check_form(page)
    assert page.table("Scores of the runs")[2][4] == "–"


def test_a_score_of_one_task_is_said_to_be_on_its_images(tmp_path):
    make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", evaluated="validation")
    (other / "summary.json").unlink()
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("top1", "top9"))
    page = compare(tmp_path / "a", tmp_path / "b")
    assert page.table("Ensemble: test accuracy (%)")


@pytest.mark.parametrize(
    ("values", "lowest"),
    [((3.91161, 3.91175), 0), ((0.0009942, 0.0009948), 0), ((0.0, 0.0), 0), ((99.5, 99.75), 99)],
)
def test_labels_of_an_axis_have_room(values, lowest):
    from fastdml.report.html.charts import Line, line_chart

    points = list(enumerate(values, start=1))
    chart = str(line_chart("name", "title", [Line("a", "c0 m0", points)]))
    labels = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert len(labels) >= 2
    assert all(len(label) <= 7 for label in labels)
    assert float(labels[0].replace("−", "-")) >= lowest


# --- other words ---


def test_style_has_both_schemes_and_print():
    from fastdml.report.html.render import _read

    style = re.sub(r"\s+", " ", _read("style.css"))
    for wanted in ("prefers-color-scheme: dark", "@media print", "prefers-reduced-motion: reduce"):
        assert wanted in style
