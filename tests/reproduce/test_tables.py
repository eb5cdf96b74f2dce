"""The record of a reproduction on disk, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import COMMIT, record, row, training

from fastdml.errors import InputError
from fastdml.reproduce import plots
from fastdml.reproduce.record import (
    RECORD,
    Side,
    read_record,
    training_record,
    write_record,
)
from fastdml.reproduce.results import write_results
from fastdml.reproduce.statistics import difference
from fastdml.reproduce.tables import comma_separated, markdown, table
from fastdml.reproduce.texts import escaped, p_text, signed


def cells(text: str) -> list[list[str]]:
    """The cells of the one table in a text of Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_row_has_papers_figures_ours_and_their_difference():
    head, rule, line = cells(table(record()))
    assert head == [
        "", "paper, independent", "paper, mutual", "independent", "mutual",
        "difference (95 % interval)", "p",
    ]  # fmt: skip
    assert set("".join(rule)) == {"-"}
    found = difference([60.0, 61.0, 59.5], [62.0, 62.0, 61.5])
    assert line == [
        *("ResNet-8 x2: peer 1", "68.99", "71.19", "60.17 ± 0.76", "61.83 ± 0.29"),
        f"+1.67 ({found.low:+.2f} to {found.high:+.2f})",
        f"{found.p:.3f}",
    ]


def test_columns_line_up_as_text():
    lines = table(record(row(), row("a longer label than the other one"))).splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("scale", ["small", "smoke", "digits", "of my own"])
def test_every_scale_but_the_full_one_says_at_its_top_what_was_changed(scale):
    first = markdown(record(scale=scale)).splitlines()[0]
    changed = "20,000 of 50,000 training images; 8 epochs in place of 200."
    assert first == f"Scaled down: {scale}: {changed}"
    assert markdown(record(scale=scale, changes=())).startswith(f"Scaled down: {scale}.\n")


def test_the_full_scale_is_not_scaled_down():
    text = markdown(record(scale="full", changes=()))
    assert text.startswith("# Top-1 accuracy of two peers\n\nIn the paper: Table 2.\n")
    assert "caled down" not in text


def test_seeds_notes_command_versions_commit_device_and_cost_are_there():
    text = markdown(record())
    for said in (
        "Seeds 0, 1, 2.",
        "Of the last weights.",
        "```sh\nfastdml reproduce table2 --scale small\n```",
        "fastdml 1.2.3, torch 2.11.0",
        f"commit {COMMIT}",
        "AMD EPYC, 1 thread",
        "2026-01-02T03:04:05+00:00",
        f"3 trainings, 4.5 min in all, on AMD EPYC, 1 thread, by commit {COMMIT}.",
    ):
        assert said in text, said


def test_columns_of_the_paper_go_where_it_has_no_figure():
    without = row(
        baseline=Side("independent", None, (1.0,) * 3), ours=Side("mutual", None, (2.0,) * 3)
    )
    assert cells(table(record(without)))[0][:3] == ["", "independent", "mutual"]


def test_sides_of_other_names_are_named_in_their_cells():
    other = row("one-way", baseline=Side("distilled", 69.48, (60.0, 61.0, 62.0)))
    head, _, first, second = cells(table(record(row(), other)))
    assert head[1:5] == ["paper, baseline", "paper, mutual", "baseline", "mutual"]
    assert first[1] == "68.99 (independent)"
    assert second[3] == "61.00 ± 1.00 (distilled)"


def test_one_seed_has_no_interval_and_says_so():
    one = record(
        row(baseline=Side("independent", None, (60.0,)), ours=Side("mutual", None, (61.5,))),
        seeds=(4,),
        trainings=(training(4),),
    )
    assert cells(table(one))[2][1:] == ["60.00", "61.50", "+1.50 (one seed: no interval)", "-"]
    text = markdown(one)
    assert "Seed 4. " in text
    assert "With one seed a difference has neither interval nor test." in text
    assert "±" not in text


def test_the_same_difference_in_every_seed_has_no_p():
    equal = row(ours=Side("DML_e", None, (60.0, 61.0, 59.5)))
    assert cells(table(record(equal)))[2][-2:] == ["0.00 in every seed", "-"]


@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_training_that_failed_is_told_of(lost):
    text = markdown(record(row(ours=Side("mutual", None, (62.0, lost, 61.5)))))
    line = cells(text)[2]
    assert line[3] == "61.75 ± 0.35, 2 of 3 seeds"
    assert line[4].startswith("+2.00 in every seed")
    assert (
        "No value of mutual, ResNet-8 x2: peer 1, seed 1: it is in no mean, nor is its pair."
        in text
    )


def test_trainings_that_all_failed():
    failed = record(row(ours=Side("mutual", None, (None,) * 3)))
    line = cells(table(failed))[2]
    assert line[3:] == ["failed", "-", "-"]
    text = markdown(failed)
    assert text.count("Failed: no seed has a value.") == 1
    assert "No value of" not in text  # a sentence a seed and row would say no more


def test_a_figure_by_itself_has_no_difference():
    head, _, line = cells(table(record(row(baseline=None))))
    assert head == ["", "paper, mutual", "mutual"]
    assert line == ["ResNet-8 x2: peer 1", "71.19", "61.83 ± 0.29"]


def test_nats_have_more_digits_and_their_unit():
    entropy = row(
        unit="nats",
        better="",
        baseline=Side("independent", 0.2602, (0.25, 0.26, 0.27)),
        ours=Side("mutual", 1.7099, (1.5, 1.6, 1.7)),
    )
    line = cells(table(record(entropy)))[2]
    assert line[1:5] == ["0.2602", "1.7099", "0.2600 ± 0.0100 nats", "1.6000 ± 0.1000 nats"]


def test_small_numbers_as_text():
    assert p_text(0.0004) == "below 0.001"
    assert p_text(0.00051) == "0.001"
    assert p_text(0.04951) == "0.050"
    assert signed(0.001, "%") == signed(-0.001, "%") == "0.00"
    assert signed(-0.016, "%") == "-0.02"


@settings(max_examples=100, deadline=None)
@given(label=st.text(min_size=1, max_size=30))
def test_any_label_stays_in_its_cell(label):
    text = table(record(row(label), row()))
    assert len(text.splitlines()) == 4
    shown = cells(text)[2]
    assert len(shown) == 7
    assert re.sub(r"\\(.)", r"\1", shown[0]) == " ".join(label.split())


def test_what_markdown_would_read_as_markup_is_escaped():
    assert escaped("a|b_c*d`<e>[f]\n#g") == r"a\|b\_c\*d\`\<e\>\[f\] \#g"


def test_the_csv_has_a_line_a_row_and_a_line_a_seed():
    label = 'peer "1", of two'
    found = record(row(label, ours=Side("mutual", None, (62.0, None, 61.5))), row())
    lines = list(csv.DictReader(io.StringIO(comma_separated(found))))
    assert [(line["row"], line["seed"]) for line in lines] == [
        (name, seed) for name in (label, "ResNet-8 x2: peer 1") for seed in ("all", "0", "1", "2")
    ]
    whole, first, second, _ = lines[:4]
    assert (first["baseline"], first["ours"], first["difference"]) == ("60.0", "62.0", "2.0")
    assert (second["baseline"], second["ours"], second["difference"]) == ("61.0", "", "")
    assert (whole["pairs"], whole["p"], whole["paper_ours"]) == ("2", "", "")
    assert float(lines[4]["p"]) == difference([60.0, 61.0, 59.5], [62.0, 62.0, 61.5]).p
    assert {(line["experiment"], line["scale"], line["unit"]) for line in lines} == {
        ("table2", "small", "%")
    }
    assert {line["scaled_down"] for line in lines} == {"; ".join(found.changes)}
    assert found.changes


def test_a_record_is_what_was_written(tmp_path):
    found = record(row(x=2.0, series="single"), row("alone", baseline=None))
    write_record(tmp_path / RECORD, found)
    assert read_record(tmp_path / RECORD) == found
    json.loads((tmp_path / RECORD).read_text(), parse_constant=lambda c: pytest.fail(c))


def test_nan_is_null_in_a_record(tmp_path):
    write_record(tmp_path / RECORD, record(row(ours=Side("mutual", None, (1.0, math.nan, 3.0)))))
    (found,) = read_record(tmp_path / RECORD).rows
    assert found.ours.values == (1.0, None, 3.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": "1"}',
        '{"version": 1, "rows": [1]}',
        "\0",
    ],
)
def test_what_is_no_record_is_one_line(tmp_path, text):
    path = tmp_path / RECORD
    path.write_text(text)
    with pytest.raises(InputError, match="no record of a reproduction") as refusal:
        read_record(path)
    assert "\n" not in str(refusal.value)


def test_a_record_with_another_number_of_values_than_of_seeds_is_none(tmp_path):
    found = record().to_dict()
    found["seeds"] = [0, 1]
    (tmp_path / RECORD).write_text(json.dumps(found))
    with pytest.raises(InputError, match="3 values of 2 seeds"):
        read_record(tmp_path / RECORD)


def places(found, before=()):
    """Where there is a value in plain JSON."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        yield (*before, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*before, key))


def test_a_value_of_another_type_than_its_field_is_no_record(tmp_path):
    """Or it is one that is shown, where a field takes anything."""
    whole = record(row(x=2.0, series="single"), row("alone", baseline=None))
    provenance = {**whole.provenance, "earlier": ["fastdml reproduce table2"]}
    text = json.dumps(replace(whole, provenance=provenance).to_dict())
    path, refused = tmp_path / RECORD, set()
    for place in places(json.loads(text)):
        for value in (None, True, 3, "words", ["a", "b", "c"], [[1], [2], [3]], {"a": 1}):
            damaged = json.loads(text)
            inner = damaged
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(damaged))
            try:
                found = read_record(path)
            except InputError:
                refused.add(place[0])
            else:
                assert markdown(found).strip()
                assert comma_separated(found).strip()
    assert refused == json.loads(text).keys()
    path.write_text(json.dumps({**json.loads(text), "seeds": [0, 1, 1]}))
    with pytest.raises(InputError, match=r"seeds \(0, 1, 1\), of which some are the same"):
        read_record(path)


def test_a_record_of_a_later_version_is_refused(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({**record().to_dict(), "version": 2}))
    with pytest.raises(InputError, match="update fastdml"):
        read_record(tmp_path / RECORD)


def test_a_record_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_record(tmp_path / RECORD)


def test_a_training_of_a_summary():
    phase = {"scores": {}, "wall_seconds": 10.5}
    summary = {
        "command": "fastdml train digits --root /srv/somebody/data",
        "device": "AMD EPYC, 1 thread",
        "threads": 1,
        "execution": "eager",
        "versions": {"fastdml": "1"},
        "date": "2026-01-02T03:04:05+00:00",
        "mutual": phase,
        "independent": phase,
    }
    found = training_record("digits-x2", 3, summary, (COMMIT,))
    assert (found.seed, found.seconds, found.commits) == (3, 21.0, (COMMIT,))
    assert found.command == "fastdml train digits --root ROOT"
    assert training_record("digits-x2", 3, {**summary, "independent": None}).seconds == 10.5


def test_everything_is_written_and_made_again_from_the_record_alone(tmp_path):
    found = record(row(x=1.0, series="single"), row("x2", x=2.0, series="single"))
    paths = write_results(tmp_path / "small" / "table2", found)
    names = {path.name for path in paths}
    assert names == {RECORD, "table.md", "table.csv", "differences.png", "curve.png"}
    assert names == {path.name for path in (tmp_path / "small" / "table2").iterdir()}
    again = read_record(paths[0])
    assert paths[1].read_text() == markdown(again)
    assert paths[2].read_text() == comma_separated(again)


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = write_results(tmp_path, record())
    assert {path.name for path in paths} == {RECORD, "table.md", "table.csv"}
    assert "pip install 'fastdml[train]'" in caplog.text


def test_a_picture_of_what_the_record_no_longer_has_goes(tmp_path):
    """Where all its trainings have failed since, and it has no points of a curve."""
    for name in (plots.DIFFERENCES, plots.CURVE):
        (tmp_path / f"{name}.png").write_bytes(b"of an earlier record")
    lost = row(baseline=Side("independent", None, (None,)), ours=Side("mutual", None, (None,)))
    paths = write_results(tmp_path, record(lost, seeds=(0,), trainings=()))
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in paths} == {RECORD, "table.md", "table.csv"}


def test_pictures_bear_the_digest_of_their_record(tmp_path):
    from PIL import Image

    (picture,) = plots.draw(tmp_path, record())
    with Image.open(picture) as image:
        assert image.text[plots.MARK] == plots.digest(record())
        assert image.width <= 1100
    assert picture.stat().st_size < 100_000
    assert plots.digest(record(seeds=(0, 1, 3))) != plots.digest(record())


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_picture_of_differences_shows_each_seed_and_the_interval():
    entropy = row("entropy", unit="nats", ours=Side("mutual", None, (60.1, 61.1, 59.9)))
    figure = plots.differences(record(row(), entropy))
    points, nats = figure.axes
    seeds, interval, mean = [line.get_xdata() for line in points.lines[:3]]
    found = difference([60.0, 61.0, 59.5], [62.0, 62.0, 61.5])
    assert list(seeds) == [2.0, 1.0, 2.0]
    assert list(interval) == [found.low, found.high]
    assert list(mean) == [found.mean]
    assert points.get_xlabel() == "mutual minus independent (points)"
    assert nats.get_xlabel() == "mutual minus independent (nats)"
    assert "scaled down: small" in "\n".join(texts(figure))
    assert "caled down" not in "\n".join(texts(plots.differences(record(scale="full"))))


def test_the_picture_of_one_seed_has_no_interval():
    one = row(baseline=Side("independent", None, (60.0,)), ours=Side("mutual", None, (61.5,)))
    (axis,) = plots.differences(record(one, seeds=(0,))).axes
    assert [list(line.get_xdata()) for line in axis.lines[:2]] == [[1.5], [1.5]]
    assert plots.pictures_of(record(replace(one, baseline=None), seeds=(0,))) == []


def test_curves_have_a_line_a_series_and_side():
    rows = [
        row(
            f"{series}, {K} peers",
            series=series,
            x=float(K),
            baseline=row().baseline if K > 1 else None,
        )
        for series in ("single", "ensemble")
        for K in (1, 2, 4)
    ]
    figure = plots.curve(record(*rows))
    (axis,) = figure.axes
    labels = [text for text in texts(figure) if ", " in text]
    assert {"single, mutual", "single, independent"} <= set(labels)
    assert {"ensemble, mutual", "ensemble, independent"} <= set(labels)
    assert [int(t) for t in axis.get_xticks()] == [1, 2, 4]
    means = [list(line.get_xdata()) for line in axis.lines if line.get_linestyle() in ("-", "--")]
    assert means.count([1.0, 2.0, 4.0]) == 2
    assert means.count([2.0, 4.0]) == 2
    assert plots.pictures_of(record(*rows)) == [plots.DIFFERENCES, plots.CURVE]
    assert plots.pictures_of(record()) == [plots.DIFFERENCES]
