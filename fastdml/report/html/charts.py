"""Charts as inline SVG: text, colours and lines follow the page's style sheet, in light and dark.

A peer's colour and marker are classes, c0 to c5 and one of six shapes, so that they differ without
colour too. Columns of a line chart are strips whose `title` a browser shows under the pointer; the
same values stand in the table below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

COLOURS = SHAPES = 6
WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38
MOST_COLUMNS = 240  # strips of a chart, and points of a line
MARKED = 12  # markers on a line, about
BANDS = 10  # shades of a plane


class Line(NamedTuple):
    label: str
    look: str  # classes: "c0 m0", or "ensemble"
    points: Sequence[tuple[float, float | None]]  # x rising; None: a gap
    dashed: bool = False


def peer_look(k: int) -> str:
    return f"c{k % COLOURS} m{k // COLOURS % SHAPES if k >= COLOURS else k % SHAPES}"


def line_chart(
    name: str, title: str, lines: Sequence[Line], x_label: str = "epoch", whole: bool = True
) -> Markup:
    """name: unique within the page. Lines without a single value are left out. whole: x counts
    something, so that between 1 and 2 there is no tick."""
    lines = [_thinned(line) for line in lines if any(y is not None for _, y in line.points)]
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points if y is not None]
    if not ys:
        return Markup("")
    least = 1.0 if whole and xs[-1] >= 1 else 0.0
    x_ticks = ticks(min(0.0, xs[0]), max(xs[-1], 1e-9), 6, least)
    y_ticks = ticks(min(ys), max(ys), 5, _finest(max(map(abs, ys))))
    place = _Place((x_ticks[0], max(xs[-1], 1e-9)), (y_ticks[0], y_ticks[-1]))
    described = "; ".join(f"{line.label}: {_span(line.points)}" for line in lines[:8]) + (
        "" if len(lines) <= 8 else f"; and {len(lines) - 8} more"
    )
    parts = [_opening(name, title, described, WIDTH, HEIGHT), _grid(place, x_ticks, y_ticks)]
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label
        )
    )
    parts += [_drawn(line, place) for line in lines]
    parts.append(_strips(lines, xs, place, x_label))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def legend_mark(look: str, dashed: bool = False) -> Markup:
    """A short piece of line with its marker, beside a label."""
    line = Markup('<line class="line{}" x1="1" y1="7" x2="27" y2="7"/>').format(
        " dashed" if dashed else ""
    )
    return Markup('<svg class="key {}" viewBox="0 0 28 14" aria-hidden="true">{}{}</svg>').format(
        look, line, _marker(look, 14, 7)
    )


class Bar(NamedTuple):
    start: float  # 0 to 1
    end: float
    value: float  # 0 to 1; NaN: none
    weight: float  # 0, pale, to 1
    text: str


def reliability_chart(name: str, title: str, described: str, bars: Sequence[Bar]) -> Markup:
    """Accuracy over confidence: bars against the diagonal of the perfectly calibrated."""
    size, edge = 200, 30
    inner = size - edge - 8

    def x(v: float) -> float:
        return _short(edge + inner * v)

    def y(v: float) -> float:
        return _short(8 + inner * (1 - v))

    parts = [_opening(name, title, described, size, size + 8)]
    for tick in (0.0, 0.5, 1.0):
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>'
                '<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>'
            ).format(
                x(0), x(1), y(tick), y(tick),
                edge - 4, y(tick) + 4, f"{100 * tick:.0f}",
                x(tick) - (6 if tick == 1 else 0), size - 8, f"{100 * tick:.0f}",
            )
        )  # fmt: skip
    for bar in bars:
        if math.isfinite(bar.value):
            width = x(bar.end) - x(bar.start) - 1
            parts.append(
                Markup(
                    '<rect class="bar" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}">'
                    "<title>{}</title></rect>"
                ).format(
                    x(bar.start),
                    y(bar.value),
                    _short(width),
                    _short(y(0) - y(bar.value)),
                    round(0.35 + 0.65 * bar.weight**0.5, 2),
                    bar.text,
                )
            )
    parts.append(
        Markup(
            '<line class="diagonal" x1="{}" y1="{}" x2="{}" y2="{}"/>'
            '<text class="axis" x="{}" y="{}" text-anchor="middle">confidence (%)</text></svg>'
        ).format(x(0), y(0), x(1), y(1), x(0.5), size + 5)
    )
    return Markup("").join(parts)


def plane_chart(
    name: str,
    title: str,
    described: str,
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[Sequence[float | None]],
    points: Sequence[tuple[str, str, float, float]],
) -> Markup:
    """Values over a plane, the higher the darker, in bands of a logarithmic scale. x, y: rising,
    two at least; values: (len(y), len(x)), None: no value. points: label, look, x and y of what is
    marked on it."""
    place = _Place(_edges(x), _edges(y))
    there = [max(v, 1e-12) for row in values for v in row if v is not None]
    low, high = math.log(min(there, default=1.0)), math.log(max(there, default=1.0))
    parts = [_opening(name, title, described, WIDTH, HEIGHT)]
    lefts, tops = _borders(x), _borders(y)
    for j, row in enumerate(values):
        for i, value in enumerate(row):
            if value is None:
                continue
            share = (math.log(max(value, 1e-12)) - low) / (high - low or 1)
            left, right = place.x(lefts[i]), place.x(lefts[i + 1])
            top, bottom = place.y(tops[j + 1]), place.y(tops[j])
            parts.append(
                Markup(
                    '<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}">'
                    "<title>{}</title></rect>"
                ).format(
                    left, top, _short(right - left), _short(bottom - top),
                    round(math.floor(share * BANDS * 0.999) / (BANDS - 1) * 0.9, 2),
                    f"{_tick(x[i])}, {_tick(y[j])}: {number_text(value)}",
                )
            )  # fmt: skip
    parts.append(_grid(place, *(_within(ticks(v[0], v[-1], 5), v) for v in (x, y))))
    for label, look, at_x, at_y in points:
        if x[0] <= at_x <= x[-1] and y[0] <= at_y <= y[-1]:
            parts.append(
                Markup('<g class="{} marked">{}<title>{}</title></g>').format(
                    look, _marker(look, place.x(at_x), place.y(at_y)), label
                )
            )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _borders(values: Sequence[float]) -> list[float]:
    """Half-way between the values, and as far beyond the first and the last."""
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    return [2 * values[0] - middles[0], *middles, 2 * values[-1] - middles[-1]]


def _edges(values: Sequence[float]) -> tuple[float, float]:
    borders = _borders(values)
    return borders[0], borders[-1]


def _within(found: Sequence[float], values: Sequence[float]) -> list[float]:
    return [tick for tick in found if values[0] - 1e-9 <= tick <= values[-1] + 1e-9]


def ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in about `count` steps of `least` or
    more."""
    if not high > low:
        spread = abs(high) * 0.1
        low, high = low - spread, high + (spread or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _finest(largest: float) -> float:
    """The smallest step whose ticks have room beside the chart, by the largest value."""
    if not largest:
        return 0.0
    return 10.0 ** (math.floor(math.log10(largest)) - (3 if largest >= 1 else 2))


def number_text(value: float | None) -> str:
    """A value of a curve for people: four significant digits."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.4g}"


class _Place(NamedTuple):
    """Where values lie in a chart."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _short(LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low or 1))

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _short(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low or 1))


def _short(value: float) -> float:
    return round(value, 1)


def _opening(name: str, title: str, described: str, width: int, height: int) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">'
        '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>'
    ).format(width, height, name, name, name, title, name, described)


def _grid(place: _Place, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Markup:
    parts = []
    for tick in y_ticks:
        y = place.y(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, _tick(tick))
        )
    for tick in x_ticks:
        if tick <= place.x_range[1] * (1 + 1e-9):
            text, x = _tick(tick), place.x(tick)
            if len(text) > 3:
                x = _short(min(x, WIDTH - 3.6 * len(text)))  # so that it ends within the chart
            parts.append(
                Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    x, HEIGHT - BOTTOM + 16, text
                )
            )
    return Markup("").join(parts)


def _tick(value: float) -> str:
    text = f"{value:,.6g}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return "0" if text == "-0" else text.replace("-", "−")


def _drawn(line: Line, place: _Place) -> Markup:
    pieces: list[list[str]] = [[]]
    for x, y in line.points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{place.x(x)} {place.y(y)}")
    path = " ".join("M" + "L".join(piece) for piece in pieces if piece)
    there = [(x, y) for x, y in line.points if y is not None]
    every = max(1, len(there) // MARKED)
    marks = [_marker(line.look, place.x(x), place.y(y)) for x, y in there[every - 1 :: every]]
    return Markup('<g class="{}{}"><path class="line" d="{}"/>{}</g>').format(
        line.look, " dashed" if line.dashed else "", path, Markup("").join(marks)
    )


def _marker(look: str, x: float, y: float) -> Markup:
    """A shape of about 7 units at a point; the ensemble's line has none."""
    if " m" not in look:
        return Markup("")
    kind = int(look.rpartition("m")[2])
    if kind == 0:
        return Markup('<circle class="mark" cx="{}" cy="{}" r="3"/>').format(x, y)
    corners: Iterable[tuple[float, float]] = (
        ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        ((0, -3.8), (3.6, 2.8), (-3.6, 2.8)),
        ((0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)),
        ((0, 3.8), (3.6, -2.8), (-3.6, -2.8)),
        ((-1.2, -4), (1.2, -4), (1.2, 4), (-1.2, 4)),
    )[kind - 1]
    points = " ".join(f"{_short(x + dx)},{_short(y + dy)}" for dx, dy in corners)
    return Markup('<polygon class="mark" points="{}"/>').format(points)


def _strips(lines: Sequence[Line], xs: Sequence[float], place: _Place, x_label: str) -> Markup:
    """An invisible strip around each x, whose title lists the lines' values there."""
    values = [dict(line.points) for line in lines]
    if len(xs) > MOST_COLUMNS:
        xs = [xs[round(i * (len(xs) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    edges = [place.x(x) for x in xs]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    starts, ends = [edges[0] - 4, *middles], [*middles, edges[-1] + 4]
    strips = []
    for x, start, end in zip(xs, starts, ends, strict=True):
        text = [f"{x_label} {_tick(x)}"]
        text += [
            f"{line.label}: {number_text(points[x])}"
            for line, points in zip(lines, values, strict=True)
            if x in points
        ]
        strips.append(
            Markup(
                '<rect class="strip" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
            ).format(
                _short(start), TOP, _short(max(end - start, 0.5)), HEIGHT - TOP - BOTTOM,
                "\n".join(text),
            )
        )  # fmt: skip
    return Markup("").join(strips)


def _thinned(line: Line) -> Line:
    """At most `MOST_COLUMNS` points, the first and the last among them."""
    points = list(line.points)
    if len(points) > MOST_COLUMNS:
        step = (len(points) - 1) / (MOST_COLUMNS - 1)
        points = [points[round(i * step)] for i in range(MOST_COLUMNS)]
    return line._replace(points=points)


def _span(points: Sequence[tuple[float, float | None]]) -> str:
    there = [y for _, y in points if y is not None]
    return f"from {number_text(there[0])} to {number_text(there[-1])}"
