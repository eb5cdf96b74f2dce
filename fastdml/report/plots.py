"""The pictures of a run, drawn from its metrics.jsonl: curves and pairwise_kl, as PNG, PDF or SVG.

They are as wide as a column of a paper and are read at that size: 7-point letters, panels one below
the other, colours that colour-blind readers tell apart, and for peers also markers.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastdml.errors import InputError, require
from fastdml.files import write_atomically
from fastdml.paths import expanded
from fastdml.report.metrics_log import INDEPENDENT, METRICS, TEACHER_KL, read_metrics
from fastdml.report.scoring import Headline
from fastdml.yaml_file import CONFIG, read_settings

WIDTH, DPI = 3.4, 300  # inches, dots an inch
LETTERS = 58  # of a line of that width
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 2.8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "pdf.fonttype": 42,  # letters that can be searched and edited, as publishers ask
}
# Okabe and Ito, "Color Universal Design", 2008, without black, for the ensemble, and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "os^Dv*"
MARKED_POINTS = 16  # markers on a curve, about
ENOUGH_EPOCHS = 10  # with fewer, the readings within epochs are shown too, as dots
SPANS = 4  # of training, in pairwise_kl
MANY_PEERS = 6  # beyond these a heat map has no place for numbers

Records = list[dict[str, Any]]


def draw(
    folder: str | Path, headlines: Sequence[Headline], formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Draws a run's pictures into its folder, in each of `formats`; returns their paths. headlines:
    the scores to draw."""
    folder = expanded(folder)
    if not formats:
        return []
    return [*plot_curves(folder, headlines, formats), *plot_pairwise_kl(folder, formats)]


def plot_curves(
    folder: Path, headlines: Sequence[Headline], formats: Sequence[str] = ("png",)
) -> list[Path]:
    """curves: training losses and scores by epoch, with those of independent/ where it is."""
    with in_style():
        return save_figure(_curves(_runs(folder), headlines), folder / "curves", formats)


def plot_pairwise_kl(folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """pairwise_kl: KL(teacher || student) of every pair, over four spans of training, on one scale
    for all. None where there is no pair: a single peer, or nothing logged."""
    records = _runs(folder)
    spans = {run: found for run, r in records.items() if (found := pairwise_spans(r))}
    if not spans:
        return []
    with in_style():
        figure = _heat_maps(spans, _names(next(iter(records.values()))))
        return save_figure(figure, folder / "pairwise_kl", formats)


def _curves(runs: dict[str, Records], headlines: Sequence[Headline]) -> Any:
    records = next(iter(runs.values()))
    names = _names(records)
    panels = _panels(records, len(names), headlines)
    grouped = any("groups" in record for record in records)
    legend = _legend(names, list(runs), "ensembles' mean" if grouped else "ensemble")
    columns = 2 if max(len(entry[-1]) for entry in legend) <= LETTERS // 2 - 6 else 1
    rows = math.ceil(len(legend) / columns)
    figure, axes = new_figure(1.55 * len(panels) + 0.14 * rows + 0.3, len(panels), 1, sharex=True)
    for axis, (kind, key, title, unit) in zip(axes[:, 0], panels, strict=True):
        for number, run in enumerate(runs.values()):
            _draw_run(axis, run, kind, key, unit, names, dashed=number > 0)
        axis.set_title(title, loc="left")
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("epoch")
    lines = require("matplotlib.lines", "train")
    figure.legend(
        handles=[
            lines.Line2D([], [], color=colour, marker=marker, linestyle=style, label=label)
            for colour, marker, style, label in legend
        ],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        columnspacing=1.2,
        labelspacing=0.3,
    )
    return figure


def _panels(
    records: Records, K: int, headlines: Sequence[Headline]
) -> list[tuple[str, str, str, float]]:
    """The panels of a figure: (kind of record, its key, title, unit) of each."""
    panels = [("train", "ce", "training cross-entropy (nats)", 1.0)]
    if others := whom_peers_learn_from(records, K):
        panels.append(("train", "kl", f"training KL from {others} (nats)", 1.0))
    if any("metric" in r for r in records):
        panels.append(("train", "metric", "training loss on features", 1.0))
    images = "validation" if any(r["kind"] == "validation" for r in records) else "test"
    panels += [(images, score.name, f"{images} {score.title} (%)", 100.0) for score in headlines]
    return panels


def whom_peers_learn_from(records: Records, K: int) -> str:
    """The networks that the KL term of a run of K peers is from, by its records; empty: none."""
    taught = any(key.startswith(TEACHER_KL) for record in records for key in record)
    others = ["the other peers"] if K > 1 else []
    others += ["the teachers"] if taught else []
    return " and ".join(others)


def _legend(
    names: Sequence[str], runs: Sequence[str], ensemble: str
) -> list[tuple[Any, str, str, str]]:
    """(colour, marker, line style, label) of each entry."""
    entries = [
        (*peer_style(k, len(names)), "-", "\n".join(textwrap.wrap(name, LETTERS - 6)))
        for k, name in enumerate(names)
    ]
    if len(names) > 1:
        entries.append(("black", "", "-", ensemble))
    if max(len(names), len(runs)) > 1:
        styles = zip(runs, ("-", "--"), strict=False)
        entries += [("0.5", "", style, run) for run, style in styles]
    return entries


def _draw_run(
    axis: Any, records: Records, kind: str, key: str, unit: float, names: list[str], dashed: bool
) -> None:
    """The curves of all peers: of training over the means of epochs, which are calm, with the
    readings within epochs as dots where there are few epochs."""
    line, dots = curve_points([r for r in records if key in r], kind)
    style: dict[str, Any] = {"linestyle": "--" if dashed else "-"}
    if dashed:
        style["markerfacecolor"] = "white"
    every = math.ceil(len(line) / MARKED_POINTS) or None
    for k in range(len(names)):
        colour, marker = peer_style(k, len(names))
        for points, look in (
            (dots, {"linestyle": "", "marker": ".", "markersize": 2, "alpha": 0.3}),
            (line, {**style, "marker": marker, "markevery": every}),
        ):
            values = [_scaled(r[key][k], unit) for r in points]
            axis.plot([r["epoch"] for r in points], values, color=colour, **look)
    if kind in ("test", "validation") and len(names) > 1:
        values = [_scaled(r[f"ensemble_{key}"], unit) for r in line]
        axis.plot([r["epoch"] for r in line], values, color="black", **style)


def curve_points(records: Records, kind: str) -> tuple[Records, Records]:
    """The records that a curve joins, and those shown as dots beside it."""
    readings = [r for r in records if r["kind"] == kind]
    epochs = [r for r in records if r["kind"] == "epoch"] if kind == "train" else []
    if not epochs:
        return readings, []
    return epochs, readings if len(epochs) < ENOUGH_EPOCHS else []


def _heat_maps(runs: dict[str, list[tuple[str, list[list[float]]]]], names: list[str]) -> Any:
    K = len(names)
    columns = 2 if max(map(len, runs.values())) > 1 else 1
    rows = sum(math.ceil(len(spans) / columns) for spans in runs.values())
    numbered = "   ".join(f"{k}:\xa0{name}" for k, name in enumerate(names, 1))
    caption = textwrap.wrap(numbered, LETTERS, break_on_hyphens=False)
    figure, axes = new_figure(1.55 * rows + 0.13 * len(caption) + 0.6, rows, columns)
    values = [v for spans in runs.values() for _, m in spans for row in m for v in row if v == v]
    top = max(values, default=0.0) or 1.0
    image, row = None, 0
    for run, spans in runs.items():
        for number, (label, matrix) in enumerate(spans):
            axis = axes[row + number // columns, number % columns]
            image = axis.imshow(matrix, vmin=0, vmax=top, cmap="viridis")
            axis.set_title(f"{run}, {label}")
            _write_values(axis, matrix, top)
        row += math.ceil(len(spans) / columns)
    for axis in axes.flat:
        if not axis.images:
            axis.set_axis_off()
            continue
        axis.grid(False)
        axis.set_facecolor("0.9")  # shows on the diagonal, where there is no pair
        every = range(0, K, math.ceil(K / 9))
        axis.set_xticks(every, [str(k + 1) for k in every])
        axis.set_yticks(every, [str(k + 1) for k in every])
        axis.set(xlabel="student", ylabel="teacher")
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.03, aspect=40)
    bar.set_label("KL(teacher || student) (nats)\n" + "\n".join(caption))
    bar.ax.grid(False)
    return figure


def _write_values(axis: Any, matrix: list[list[float]], top: float) -> None:
    if len(matrix) > MANY_PEERS:
        return
    for teacher, line in enumerate(matrix):
        for student, v in enumerate(line):
            if v == v:
                axis.text(
                    *(student, teacher),
                    f"{v:.2f}" if v < 10 else f"{v:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6.5 if len(matrix) < 5 else 5,
                    color="black" if v > 0.6 * top else "white",
                )


def pairwise_spans(records: Records) -> list[tuple[str, list[list[float]]]]:
    """Up to four equal spans of training, each with its mean (K, K) matrix, NaN on the diagonal."""
    points = [r for r in records if len(r.get("pairwise_kl") or ()) > 1]
    epochs = [r for r in points if r["kind"] == "epoch"]
    points = epochs if len(epochs) >= SPANS else [r for r in points if r["kind"] == "train"]
    if not points:
        return []
    count = min(SPANS, len(points))
    bounds = [round(i * len(points) / count) for i in range(count + 1)]
    K = len(points[0]["pairwise_kl"])
    spans, start = [], 0.0
    for first, end in pairwise(bounds):
        span = [r["pairwise_kl"] for r in points[first:end]]
        mean = [
            [
                math.nan
                if i == j or any(m[i][j] is None for m in span)
                else sum(m[i][j] for m in span) / len(span)
                for j in range(K)
            ]
            for i in range(K)
        ]
        stop = points[end - 1]["epoch"]
        spans.append((f"epochs {start:.3g}-{stop:.3g}", mean))
        start = stop
    return spans


def _runs(folder: Path) -> dict[str, Records]:
    """The records of the run in `folder`, and of the independent one below it, by their label."""
    runs = {_label(folder): read_metrics(folder)}
    if (folder / INDEPENDENT / METRICS).exists():
        runs[INDEPENDENT] = read_metrics(folder / INDEPENDENT)
    return runs


def _label(folder: Path) -> str:
    """Whether the peers of a run learnt from each other, by its settings."""
    try:
        settings = read_settings(folder / CONFIG)
    except InputError:  # a folder that has none, or none that can be read
        return INDEPENDENT if folder.resolve().name == INDEPENDENT else "mutual"
    return "mutual" if is_mutual(settings) else INDEPENDENT


def is_mutual(settings: dict[str, Any]) -> bool:
    """Whether a loss between the peers has a weight in these settings of a run."""
    weights = {"kl_weight": 1.0, **settings}  # the default where a file leaves it out
    return any(
        value
        for name, value in weights.items()
        if name in ("kl_weight", "kl_weight_end") or name.endswith("mutual_weight")
    )


def _names(records: Records) -> list[str]:
    return next(r["names"] for r in records if r["kind"] == "peers")


def _scaled(value: float | None, unit: float) -> float:
    return math.nan if value is None else unit * value


def peer_style(k: int, count: int) -> tuple[Any, str]:
    """Colour and marker of peer k."""
    marker = MARKERS[k % len(MARKERS)]
    if count <= len(COLOURS):
        return COLOURS[k], marker
    return require("matplotlib", "train").colormaps["viridis"](k / count), marker


def in_style() -> Any:
    """A context in which matplotlib draws as the pictures of a run are drawn."""
    return require("matplotlib", "train").rc_context(STYLE)


def new_figure(height: float, rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as a column, and its axes (rows, columns). height: inches."""
    # Figure by itself, not pyplot: no global state, no display, no backend to choose.
    figure = require("matplotlib.figure", "train").Figure((WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Any, path: Path, formats: Sequence[str], **options: Any) -> list[Path]:
    """Writes PATH.FORMAT for each of the formats, each in one step. options: matplotlib's, such as
    `metadata`."""
    paths = []
    for kind in dict.fromkeys(formats):
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI, format=kind, **options)
        paths.append(path.with_name(f"{path.name}.{kind}"))
        write_atomically(paths[-1], picture.getvalue())
    return paths
