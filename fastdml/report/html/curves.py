"""The charts of a run over its epochs, each with a table of the same values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from fastdml.report.html.charts import (
    MOST_COLUMNS,
    Line,
    legend_mark,
    line_chart,
    number_text,
    peer_look,
)
from fastdml.report.plots import curve_points, whom_peers_learn_from
from fastdml.report.run_files import RunFiles, number, numbers
from fastdml.report.scoring import Headline

ENSEMBLE = "ensemble"
Records = list[dict[str, Any]]


class Panel(NamedTuple):
    """A chart and its values."""

    title: str
    chart: Markup
    head: list[str]
    rows: list[list[str]]


class Key(NamedTuple):
    """An entry of a legend."""

    mark: Markup
    label: str


def training(run: RunFiles, headlines: Sequence[Headline]) -> list[Panel]:
    """Losses and scores, those of the independent run dashed."""
    runs = phases(run)
    K = len(run.peers)
    losses = [("ce", "Training cross-entropy (nats)")]
    if others := whom_peers_learn_from(run.records, K):
        losses.append(("kl", f"Training KL from {others} (nats)"))
    losses.append(("metric", "Training loss on features"))
    panels = []
    for key, title in losses:
        lines = []
        for label, part in runs.items():
            if key == "kl" and label == "independent":
                continue  # it is measured there, but nothing learns from it
            lines += _peer_lines(part, trained(part, key), key, 1.0, label, len(runs) > 1)
        panels.append(panel(f"curve-{key}", title, lines))
    panels += _of_loss(runs)
    for score in headlines:
        lines, kinds = [], set()
        for label, part in runs.items():
            kind, records = evaluations(part)
            kinds.add(kind)
            lines += _peer_lines(part, records, score.name, 100.0, label, len(runs) > 1)
            if K > 1:
                values = [number(r.get(f"ensemble_{score.name}")) for r in records]
                lines.append(
                    _line(records, values, 100.0, ENSEMBLE, ENSEMBLE, label, len(runs) > 1)
                )
        title = f"{' and '.join(sorted(kinds)).capitalize()} {score.title} (%)"
        panels.append(panel(f"curve-{score.name}", title, lines))
    return [panel for panel in panels if panel.chart]


def _of_loss(runs: Mapping[str, RunFiles]) -> list[Panel]:
    """The numbers of the loss that followed a schedule, at the last step of each epoch."""
    panels = []
    for key, title in (("kl_weight", "Weight of the KL term"), ("temperature", "Temperature")):
        found = {
            label: [r for r in part.of_kind("epoch") if key in r] for label, part in runs.items()
        }
        lines = [
            Line(label, peer_look(k), _points(records, [number(r[key]) for r in records], 1.0))
            for k, (label, records) in enumerate(found.items())
        ]
        panels.append(panel(f"curve-{key.replace('_', '-')}", title, lines))
    return panels


def throughput(run: RunFiles) -> list[Panel]:
    """Speed of training and the share of it that waits for data, over the epochs."""
    entries = (
        ("images_per_second", "Images a second, all peers together", 1.0),
        ("data_wait", "Share of the time spent waiting for data (%)", 100.0),
    )
    panels = []
    for key, title, unit in entries:
        lines = []
        for k, (label, part) in enumerate(phases(run).items()):
            records = part.of_kind("epoch")
            values = [number(r.get(key)) for r in records]
            if key == "images_per_second":
                values = [v or None for v in values]  # 0: too short to tell
            points = _points(records, values, unit)
            lines.append(Line(label, peer_look(k), points, dashed=label == "independent"))
        panels.append(panel(f"curve-{key.replace('_', '-')}", title, lines))
    return [panel for panel in panels if panel.chart]


def legend(run: RunFiles) -> list[Key]:
    K, runs = len(run.peers), phases(run)
    keys = [Key(legend_mark(peer_look(k)), name) for k, name in enumerate(run.peers)]
    if K > 1:
        keys.append(Key(legend_mark(ENSEMBLE), ENSEMBLE))
    if len(runs) > 1:
        keys.append(Key(legend_mark("plain"), "solid: mutual"))
        keys.append(Key(legend_mark("plain", dashed=True), "dashed: independent"))
    return keys


def phases(run: RunFiles) -> dict[str, RunFiles]:
    """The run and, where it has one, its independent run, by their label."""
    found = {run.label: run}
    if run.independent is not None:
        found["independent"] = run.independent
    return found


def evaluations(run: RunFiles) -> tuple[str, Records]:
    """The records of the evaluations during training, and on which set they were."""
    if records := run.of_kind("validation"):
        return "validation", records
    return "test", [r for r in run.of_kind("test") if r.get("weights", "last") == "last"]


def runs_panel(
    name: str, title: str, runs: Mapping[str, Records], key: str, unit: float = 1.0
) -> Panel:
    """One line a run, by its label: of `key`, where that is a value a peer their mean."""
    lines = [
        Line(label, peer_look(k), _points(records, [_mean(r.get(key)) for r in records], unit))
        for k, (label, records) in enumerate(runs.items())
    ]
    return panel(name, title, lines)


def trained(run: RunFiles, key: str) -> Records:
    """The records of training with this key that a curve joins."""
    return curve_points([r for r in run.records if key in r], "train")[0]


def _mean(value: Any) -> float | None:
    if not isinstance(value, list):
        return number(value)
    there = [v for v in map(number, value) if v is not None]
    return sum(there) / len(there) if there else None


def _peer_lines(
    run: RunFiles, records: Records, key: str, unit: float, label: str, several: bool
) -> list[Line]:
    K = len(run.peers)
    by_peer = list(zip(*(numbers(r.get(key), K) for r in records), strict=True)) or [()] * K
    return [
        _line(records, values, unit, name, peer_look(k), label, several)
        for k, (name, values) in enumerate(zip(run.peers, by_peer, strict=True))
    ]


def _line(
    records: Records,
    values: Sequence[float | None],
    unit: float,
    name: str,
    look: str,
    label: str,
    several: bool,
) -> Line:
    shown = f"{name}, {label}" if several else name
    return Line(shown, look, _points(records, values, unit), dashed=label == "independent")


def _points(
    records: Records, values: Sequence[float | None], unit: float
) -> list[tuple[float, float | None]]:
    points = [
        (float(r["epoch"]), None if v is None else unit * v)
        for r, v in zip(records, values, strict=True)
        if number(r["epoch"]) is not None
    ]
    return sorted(dict(points).items())


def panel(
    name: str, title: str, lines: Sequence[Line], x_label: str = "epoch", whole: bool = True
) -> Panel:
    """name: unique within the page. whole: as of `line_chart`."""
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    chart = line_chart(name, title, lines, x_label, whole)
    values = [dict(line.points) for line in lines]
    xs = sorted({x for points in values for x in points})
    if len(xs) > MOST_COLUMNS:
        xs = [xs[round(i * (len(xs) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    rows = [[f"{x:.6g}", *(number_text(points.get(x)) for points in values)] for x in xs]
    return Panel(title, chart, [x_label, *(line.label for line in lines)], rows)
