"""The pictures of a run: what they show and say, whole, at the width of a column."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import matplotlib.image
import pytest

from fastdml.errors import InputError
from fastdml.report import plots
from fastdml.report.metrics_log import MetricsLog
from fastdml.train import TrainConfig
from fastdml.train.config.sources import preset
from fastdml.train.tasks import classification, reid

HEADLINES = classification.SCORING.headlines
RETRIEVAL = reid.SCORING.headlines

NAMES = ["resnet20-1", "resnet20-2"]
LONG = "own_package.own_module:a_function_with_a_name_that_fills_more_than_a_line"


def record(folder: Path, names: list[str], epochs: int = 4, reid: bool = False) -> Path:
    """The metrics of a run of that many epochs, with two readings in each and a last bad one."""
    K = range(len(names))
    with MetricsLog(folder, names, tensorboard=False) as log:
        for epoch in range(1, epochs + 1):
            values = [1.0 / (epoch + k) for k in K]
            pairs = [[0.0 if i == j else (1 + i) / epoch for j in K] for i in K]
            means = {"ce": values, "kl": values, "pairwise_kl": pairs}
            if reid:
                means["metric"] = values
            for step in (2 * epoch - 1, 2 * epoch):
                log.log("train", step, step / 2, **means)
            log.log("epoch", 2 * epoch, epoch, **means)
            scores = ("mAP", "rank1") if reid else ("top1",)
            test = dict.fromkeys(scores, values) | {f"ensemble_{n}": 0.5 for n in scores}
            log.log("test", 2 * epoch, epoch, **test)
        log.log("train", 99, epochs + 0.5, ce=[None for _ in K], kl=values)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Figures by the name of their file, with nothing written."""
    kept = {}

    def keep(figure, path, formats):
        kept[path.name] = figure
        return []

    monkeypatch.setattr(plots, "save_figure", keep)
    return kept


def texts(figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


@pytest.mark.parametrize("names", [["a"], NAMES, ["a", LONG], [f"resnet20-{k}" for k in range(12)]])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("reid", [False, True])
def test_pictures_are_whole_and_legible_at_the_width_of_a_column(
    tmp_path, drawn, names, independent, reid
):
    record(tmp_path, names, reid=reid)
    if independent:
        record(tmp_path / "independent", names, reid=reid)
    plots.draw(tmp_path, RETRIEVAL if reid else HEADLINES)
    assert set(drawn) == ({"curves", "pairwise_kl"} if len(names) > 1 else {"curves"})
    for figure in drawn.values():
        width, height = figure.get_size_inches()
        assert width == 3.4
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box.xmin >= -0.01
        assert box.ymin >= -0.01
        assert box.xmax <= width + 0.01
        assert box.ymax <= height + 0.01
        sizes = [t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
        assert min(sizes) >= 5
        said = " ".join(texts(figure)).replace("\n", "").replace("\xa0", " ")
        for name in names:
            assert name in said
        if len(names) > 1 or independent:
            assert "mutual" in said
        assert ("independent" in said) == independent


@pytest.mark.parametrize("spans", [1, 2, 3, 4])
def test_heat_maps_of_short_runs_are_whole(tmp_path, drawn, spans):
    record(tmp_path, NAMES, spans)
    plots.draw(tmp_path, HEADLINES)
    figure = drawn["pairwise_kl"]
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert min(box.xmin, box.ymin, width - box.xmax, height - box.ymax) >= -0.01
    assert {"student", "teacher", "KL(teacher || student) (nats)"} <= {
        t.partition("\n")[0] for t in texts(figure)
    }


@pytest.mark.parametrize("peers", [1, 2])
def test_files(tmp_path, peers):
    record(tmp_path, NAMES[:peers])
    paths = plots.draw(tmp_path, HEADLINES, ("png", "pdf", "svg", "png"))
    stems = ["curves", "pairwise_kl"][:peers]
    expected = [f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "svg")]
    assert [p.name for p in paths] == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*expected, "metrics.jsonl"])
    picture = matplotlib.image.imread(paths[0])
    assert picture.shape[1] == 1020
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert paths[1].read_bytes().startswith(b"%PDF-")
    assert b"/Type3" not in paths[1].read_bytes()
    assert b"<svg" in paths[2].read_bytes()
    assert plots.draw(tmp_path, HEADLINES, ()) == []


def test_a_run_that_logged_nothing(tmp_path):
    MetricsLog(tmp_path, NAMES, tensorboard=False).close()
    assert [p.name for p in plots.draw(tmp_path, HEADLINES)] == ["curves.png"]


def test_pictures_say_whether_peers_learnt_from_each_other(tmp_path, drawn, monkeypatch):
    def said() -> set[str]:
        words = {t.partition(",")[0] for figure in drawn.values() for t in texts(figure)}
        return words & {"mutual", "independent"}

    record(tmp_path / "run", NAMES)
    plots.draw(tmp_path / "run", HEADLINES)
    assert said() == {"mutual"}
    record(tmp_path / "run" / "independent", NAMES)
    plots.draw(tmp_path / "run", HEADLINES)
    assert said() == {"mutual", "independent"}
    plots.draw(tmp_path / "run" / "independent", HEADLINES)
    assert said() == {"independent"}
    monkeypatch.chdir(tmp_path / "run" / "independent")
    plots.draw(".", HEADLINES)
    assert said() == {"independent"}
    shutil.copytree(tmp_path / "run" / "independent", tmp_path / "copy")
    for config, label in (
        (preset("digits", kl_weight=0.0), "independent"),
        (preset("market1501", kl_weight=0.0, distance_mutual_weight=1.0), "mutual"),
        (preset("market1501").alone(), "independent"),
        (preset("digits"), "mutual"),
    ):
        config.save(tmp_path / "copy" / "config.yaml")
        plots.draw(tmp_path / "copy", HEADLINES)
        assert said() == {label}


@pytest.mark.parametrize(("epochs", "dots"), [(1, 3), (9, 19), (10, 0), (11, 0)])
def test_curves_of_training_join_the_means_of_epochs(tmp_path, drawn, epochs, dots):
    """Readings within epochs, which zigzag, are dots, and left out where there are many epochs."""
    record(tmp_path, NAMES, epochs)
    plots.draw(tmp_path, HEADLINES)
    joined = {len(x.get_xdata()) for x in drawn["curves"].axes[0].lines if x.get_linestyle() == "-"}
    single = {
        len(x.get_xdata()) for x in drawn["curves"].axes[0].lines if x.get_linestyle() == "None"
    }
    assert (joined, single) == ({epochs}, {dots})


def test_curves_of_a_first_epoch_that_is_not_over():
    records = [{"kind": "train", "epoch": e / 4} for e in (1, 2)] + [{"kind": "test", "epoch": 1}]
    assert plots.curve_points(records, "train") == (records[:2], [])
    assert plots.curve_points(records, "test") == (records[2:], [])


def test_pairwise_spans_cover_training_and_keep_teacher_and_student_apart():
    for kind, epochs in (("train", 9), ("epoch", 9)):
        records = [
            {"kind": kind, "epoch": e, "pairwise_kl": [[0.0, float(e)], [10.0 * e, 0.0]]}
            for e in range(1, epochs)
        ]
        spans = plots.pairwise_spans(records)
        assert [label for label, _ in spans] == [
            "epochs 0-2",
            "epochs 2-4",
            "epochs 4-6",
            "epochs 6-8",
        ]
        last = spans[-1][1]
        assert (last[0][1], last[1][0]) == (7.5, 75.0)
        assert math.isnan(last[0][0])


def test_formats_are_checked_as_settings():
    assert TrainConfig().figures == ("png",)
    assert TrainConfig(figures=["pdf", "svg"]).figures == ("pdf", "svg")
    assert TrainConfig(figures=[]).figures == ()
    for value, message in (
        (["jpg"], "figures must be one of png, pdf, svg, not 'jpg'"),
        ("pdf", "figures must be a list of names, not 'pdf'"),
        ([None], "figures must be one of png, pdf, svg, not None"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig(figures=value)
