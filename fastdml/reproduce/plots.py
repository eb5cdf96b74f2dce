"""The pictures of a reproduction, drawn from its record in the style of a run's.

differences.png: of each row the paired difference, its interval and every seed. curve.png, where
rows are points of curves: both sides over x, with every seed.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdml.report.plots import (
    COLOURS,
    LETTERS,
    MARKERS,
    in_style,
    new_figure,
    save_figure,
)
from fastdml.reproduce.record import Record, RowRecord, Side
from fastdml.reproduce.statistics import pairs, present, spread
from fastdml.reproduce.tables import difference_of, scaled_down

DIFFERENCES, CURVE = "differences", "curve"
ROW = 0.36  # inches
MARK = "Record"  # of a PNG's metadata: the digest of the record it was drawn from


def draw(folder: Path, record: Record) -> list[Path]:
    """Draws what the record has into `folder`, as PNG; returns the paths. Raises MissingExtra where
    matplotlib is not installed."""
    drawn = [(DIFFERENCES, differences(record)), (CURVE, curve(record))]
    paths = []
    for name, figure in drawn:
        if figure is not None:
            with in_style():
                paths += save_figure(
                    figure, folder / name, ("png",), metadata={MARK: digest(record)}
                )
    return paths


def digest(record: Record) -> str:
    """SHA-256 of what the record holds: a picture that bears another one is out of date."""
    return hashlib.sha256(json.dumps(record.to_dict(), sort_keys=True).encode()).hexdigest()


def differences(record: Record) -> Any | None:
    """A panel a unit. None where no row has a difference to show."""
    panels: dict[str, list[RowRecord]] = {}
    for row in record.rows:
        if (found := difference_of(row)) and found.mean is not None:
            panels.setdefault(row.unit, []).append(row)
    if not panels:
        return None
    heights = [len(rows) for rows in panels.values()]
    with in_style():
        figure, axes = new_figure(
            *(ROW * sum(heights) + 0.55 * len(panels) + 0.2, len(panels), 1),
            gridspec_kw={"height_ratios": heights},
        )
        for axis, (unit, rows) in zip(axes[:, 0], panels.items(), strict=True):
            _draw_differences(axis, rows)
            axis.set_xlabel(
                f"{_sides_of(rows)} ({'points' if unit == '%' else unit or 'difference'})"
            )
        _entitle(figure, record)
    return figure


def _draw_differences(axis: Any, rows: Sequence[RowRecord]) -> None:
    """Of each row, from above: its label, the seeds, the mean and the interval."""
    for y, row in enumerate(rows):
        found = difference_of(row)
        assert found is not None
        assert row.baseline is not None
        gaps = pairs(row.baseline.values, row.ours.values)
        axis.plot(gaps, [y] * len(gaps), "|", color="0.45", markersize=6, zorder=2)
        if found.low is not None:
            axis.plot([found.low, found.high], [y, y], "-", color=COLOURS[0], linewidth=1.4)
        axis.plot([found.mean], [y], "o", color=COLOURS[0], markersize=4, zorder=3)
        axis.annotate(
            textwrap.shorten(row.label, LETTERS, placeholder="..."),
            *((0.0, y - 0.27),),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=4,
        )
    axis.axvline(0, color="black", linewidth=0.6, zorder=1)
    axis.set_ylim(len(rows) - 0.6, -0.6)
    axis.set_yticks([])
    axis.grid(False, axis="y")
    axis.spines[["top", "right", "left"]].set_visible(False)


def _sides_of(rows: Sequence[RowRecord]) -> str:
    """What is subtracted from what."""
    names = {(row.ours.name, row.baseline.name) for row in rows if row.baseline}
    ours, baseline = names.pop() if len(names) == 1 else ("ours", "baseline")
    return f"{ours} minus {baseline}"


def curve(record: Record) -> Any | None:
    """None where no rows are points of curves."""
    rows = [row for row in record.rows if row.x is not None]
    if not rows:
        return None
    with in_style():
        figure, axes = new_figure(2.5, 1, 1)
        axis = axes[0, 0]
        for number, series in enumerate(dict.fromkeys(row.series for row in rows)):
            points = [row for row in rows if row.series == series]
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number]}
            _draw_line(axis, [(row.x, row.ours) for row in points], series, look)
            with_baseline = [(row.x, row.baseline) for row in points if row.baseline]
            dashed = {**look, "linestyle": "--", "markerfacecolor": "white"}
            _draw_line(axis, with_baseline, series, dashed)
        axis.set_xlabel("peers")
        axis.set_xticks(sorted({row.x for row in rows if row.x is not None}))
        axis.set_ylabel(rows[0].unit)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        _entitle(figure, record)
    return figure


def _draw_line(
    axis: Any, points: Sequence[tuple[float | None, Side]], series: str, look: dict[str, Any]
) -> None:
    """The means with their standard deviations, and each seed as a dot."""
    if not points:
        return
    spreads = [spread(side.values) for _, side in points]
    axis.errorbar(
        [x for x, _ in points],
        [float("nan") if s.mean is None else s.mean for s in spreads],
        yerr=[s.sd or 0.0 for s in spreads],
        label=f"{series}, {points[0][1].name}".removeprefix(", "),
        capsize=1.5,
        elinewidth=0.7,
        **look,
    )
    for x, side in points:
        values = present(side.values)
        axis.plot([x] * len(values), values, ".", color=look["color"], markersize=2, alpha=0.5)


def _entitle(figure: Any, record: Record) -> None:
    """Title, and that it is scaled down where it is."""
    lines = textwrap.wrap(record.title, LETTERS)
    if scaled_down(record):
        lines += textwrap.wrap(f"scaled down: {record.scale}", LETTERS)
    figure.suptitle("\n".join(lines), fontsize=7, x=0.02, ha="left")
