"""The pictures of a reproduction, drawn from its record in the style of a run's.

differences.png: of each row the paired difference, its interval and every seed. curve.png, where
rows are points of curves: both sides over x, with every seed.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from itertools import accumulate
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
from fastdml.reproduce.record import FULL, Record, RowRecord, Side
from fastdml.reproduce.statistics import pairs, present, spread
from fastdml.reproduce.texts import difference_of, label_of, sides

DIFFERENCES, CURVE = "differences", "curve"
ROW, LINE = 0.26, 0.11  # inches, of a row without its label and of a line of that
MARK = "Record"  # of a PNG's metadata: the digest of the record it was drawn from


def draw(folder: Path, record: Record) -> list[Path]:
    """Draws what the record has into `folder`, as PNG; returns the paths. Raises MissingExtra where
    matplotlib is not installed."""
    makers = {DIFFERENCES: differences, CURVE: curve}
    paths = []
    for name in pictures_of(record):
        with in_style():
            figure = makers[name](record)
            metadata = {MARK: digest(record)}
            paths += save_figure(figure, folder / name, ("png",), metadata=metadata)
    return paths


def pictures_of(record: Record) -> list[str]:
    """The pictures that a record has something for."""
    found = [difference_of(row) for row in record.rows]
    there = {
        DIFFERENCES: any(one is not None and one.mean is not None for one in found),
        CURVE: any(row.x is not None for row in record.rows),
    }
    return [name for name, is_there in there.items() if is_there]


def out_of_date(folder: Path, record: Record) -> list[Path]:
    """The pictures in `folder` that the record has nothing for, drawn from an earlier one."""
    there = pictures_of(record)
    paths = [folder / f"{name}.png" for name in (DIFFERENCES, CURVE) if name not in there]
    return [path for path in paths if path.is_file()]


def digest(record: Record) -> str:
    """SHA-256 of what the record holds: a picture that bears another one is out of date."""
    return hashlib.sha256(json.dumps(record.to_dict(), sort_keys=True).encode()).hexdigest()


def differences(record: Record) -> Any:
    """A panel a unit, with its rows that have a difference."""
    panels: dict[str, list[RowRecord]] = {}
    for row in record.rows:
        if (found := difference_of(row)) and found.mean is not None:
            panels.setdefault(row.unit, []).append(row)
    heights = [_places(record, rows)[-1] for rows in panels.values()]
    with in_style():
        figure, axes = new_figure(
            *(sum(heights) + 0.6 * len(panels) + 0.2, len(panels), 1),
            gridspec_kw={"height_ratios": heights},
        )
        for axis, (unit, rows) in zip(axes[:, 0], panels.items(), strict=True):
            _draw_differences(axis, record, rows)
            axis.set_xlabel(f"{_subtracted(record)} ({'points' if unit == '%' else unit})")
        _entitle(figure, record)
    return figure


def _places(record: Record, rows: Sequence[RowRecord]) -> list[float]:
    """Where the rows end, in inches from above: each has its label, and a line below it."""
    return list(accumulate(ROW + LINE * len(_lines(record, row)) for row in rows))


def _lines(record: Record, row: RowRecord) -> list[str]:
    return textwrap.wrap(label_of(record, row), LETTERS)


def _draw_differences(axis: Any, record: Record, rows: Sequence[RowRecord]) -> None:
    """Of each row, from above: its label, the seeds, the mean and the interval."""
    places = _places(record, rows)
    for row, end in zip(rows, places, strict=True):
        y = end - ROW / 2
        found = difference_of(row)
        assert found is not None
        assert row.baseline is not None
        gaps = pairs(row.baseline.values, row.ours.values)
        axis.plot(gaps, [y] * len(gaps), "|", color="0.45", markersize=6, zorder=2)
        if found.low is not None:
            axis.plot([found.low, found.high], [y, y], "-", color=COLOURS[0], linewidth=1.4)
        axis.plot([found.mean], [y], "o", color=COLOURS[0], markersize=4, zorder=3)
        axis.annotate(
            "\n".join(_lines(record, row)),
            *((0.0, end - ROW),),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="bottom",
            linespacing=1.0,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=4,
        )
    axis.axvline(0, color="black", linewidth=0.6, zorder=1)
    axis.set_ylim(places[-1], 0)
    axis.set_yticks([])
    axis.grid(False, axis="y")
    axis.spines[["top", "right", "left"]].set_visible(False)


def _subtracted(record: Record) -> str:
    """What from what."""
    names = sides(record)
    return " minus ".join(*names) if len(names) == 1 else "difference"


def curve(record: Record) -> Any:
    """A line a series and side, of the rows that are points of curves."""
    rows = [row for row in record.rows if row.x is not None]
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
        axis.set_xlabel(rows[0].x_name)
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
    if record.scale != FULL:
        lines += textwrap.wrap(f"scaled down: {record.scale}", LETTERS)
    figure.suptitle("\n".join(lines), fontsize=7, x=0.02, ha="left")
