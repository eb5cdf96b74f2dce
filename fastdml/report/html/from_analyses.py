"""Sections of a page that show analyses of a run: agreement, gains, and what its weights tell.

An analysis is a dict of plain values, as analysis.json has it, and no better than that file: what
is of another form than expected is left out, and named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastdml.report.analysis_file import ANALYSIS
from fastdml.report.html import curves
from fastdml.report.html.analysis_values import (
    Found,
    Unreadable,
    matrix,
    needed,
    peers,
    peers_and_ensemble,
    several,
    some_peers,
    texts,
    vector,
    whole,
)
from fastdml.report.html.charts import Line, number_text, peer_look, plane_chart
from fastdml.report.html.curves import ENSEMBLE, Panel
from fastdml.report.html.from_predictions import COUNTED, GainTable, gain_rows
from fastdml.report.run_files import RunFiles, number, table
from fastdml.report.statistics import Gain, Interval

MOST_SIDE = 41  # of a plane; of more every second value, third and so on
MOST_PAIRS = 6  # of peers between which the loss is shown
MOST_LAYERS = 12


class Heat(NamedTuple):
    """A table of numbers for each pair, with a shade of each."""

    title: str
    rows: list[tuple[str, list[tuple[str, float | None]]]]  # text, share of the largest; None: none


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    id: str
    title: str
    words: list[str]
    panels: Sequence[Panel] = ()
    heats: Sequence[Heat] = ()
    tables: Sequence[Table] = ()


class Scaled(NamedTuple):
    """Calibration after temperature scaling."""

    note: str
    peers: dict[str, tuple[str, str, str]]  # ECE, NLL, temperatures


class Both(NamedTuple):
    """An analysis of the run, and of its independent peers; one of them may be missing."""

    run: RunFiles
    of: dict[str, Found]  # by the label of the phase


def sections(run: RunFiles, found: Found, alone: Found) -> tuple[dict[str, Any], list[str]]:
    """What can be shown, by its id, None for what is not there, and a line for each analysis that
    cannot be read. found, alone: analyses by their name, of the run and of its independent
    peers."""
    problems: list[str] = []

    def read(name: str, make: Callable[[Both], Any]) -> Any:
        there = {run.label: found[name]} if name in found else {}
        if name in alone:
            there.setdefault("independent", alone[name])
        try:
            if not there:
                return None
            return make(Both(run, there))
        except Unreadable as error:
            problems.append(f"{ANALYSIS}: {name} is not as expected ({error}): left out")
            return None

    made = {
        "agreement": read("peer_agreement", _agreement),
        "by_confidence": read("gains_by_confidence", _by_confidence),
        "by_noise": read("gains_by_noise", _by_noise),
        "posterior": read("posterior", _posterior),
        "flatness": read("flat_minima", _flat_minima),
        "section": read("loss_section", _loss_sections),
        "plane": read("loss_plane", _loss_planes),
        "alignment": read("kernel_alignment", _alignment),
        "scaled": read("temperature_scaling", _scaled),
    }
    return made, problems


def _agreement(both: Both) -> Section:
    words, heats = [], []
    for label, of in both.of.items():
        names = peers(of, both.run)
        for key, title, unit in (
            ("same", "Equal answers (%)", 100),
            ("kappa", "Cohen's kappa", 1),
            ("overlap", "Errors in common, 1: by chance", 1),
        ):
            heats.append(_heat(_titled(title, label, both), names, needed(of, key), unit))
        right, jsd = number(of.get("any_right")), number(of.get("jsd"))
        if right is not None:
            who = f"{label.capitalize()} peers: at" if len(both.of) > 1 else "At"
            apart = f"; they are {jsd:.4f} nats apart (Jensen-Shannon)" if jsd is not None else ""
            words.append(f"{who} least one is right on {100 * right:.2f} % of the images{apart}.")
    meaning = (
        "How often two peers give the same answer; Cohen's kappa, which is 0 where they agree no "
        "more than chance would have it and 1 where they always do; and how often both are wrong, "
        "over how often they would be if each erred independently of the other."
    )
    return Section("agreement", "Where the peers agree", [meaning, *words], heats=heats)


def _by_confidence(both: Both) -> GainTable:
    others = (
        "the independent peers other than the one compared are"
        if len(both.run.peers) > 1
        else "the independent peer is"
    )
    return _gains(both, f"Images grouped by how sure {others} of them.")


def _by_noise(both: Both) -> GainTable:
    what = "Images grouped by whether their label was said to be right; an answer counts as right"
    return _gains(both, f"{what} where it is the label, of wrong ones too.")


def _gains(both: Both, grouped: str) -> GainTable:
    of = both.of[both.run.label]
    groups = texts(needed(of, "groups"))
    columns = [
        vector(needed(of, name), len(groups))
        for name in ("images", "before", "after", "low", "high", "gained", "lost")
    ]
    found = [[math.nan if v is None else v for v in row] for row in zip(*columns, strict=True)]
    rows = gain_rows(
        [
            (name, Gain(_count(n), a, b, Interval(low, high), _count(gained), _count(lost)))
            for name, (n, a, b, low, high, gained, lost) in zip(groups, found, strict=True)
            if n
        ]
    )
    if not rows:
        raise Unreadable("no images")
    return GainTable("independent (%)", "mutual (%)", f"{grouped} {COUNTED}", rows, True, True)


def _count(value: float) -> int:
    return max(0, int(value)) if math.isfinite(value) else 0


def _posterior(both: Both) -> Section:
    head, columns, rows = ["peer"], [], None
    images = 0
    for label, of in both.of.items():
        names = peers_and_ensemble(of, both.run, ENSEMBLE)
        if rows is not None and rows != names:
            raise Unreadable("other peers")
        rows = names
        for key, title, digits in (("entropy", "entropy (nats)", 4), ("top1", "top-1 (%)", 2)):
            values = vector(needed(of, key), len(names))
            unit = 1 if key == "entropy" else 100
            head.append(f"{label} {title}" if len(both.of) > 1 else title)
            columns.append(["–" if v is None else f"{unit * v:.{digits}f}" for v in values])
        images = int(number(of.get("images")) or 0)
    of = next(iter(both.of.values()))
    words = (
        "Entropy of the predicted probabilities, and the mean of the largest of them, on "
        f"{images:,} {_set_of(of)} images{_weights(both)}."
    )
    body = [list(row) for row in zip(rows or [], *columns, strict=True)]
    table_of = Table("Entropy of the predictions", head, body)
    return Section("posterior", "How sure the peers are", [words], tables=[table_of])


def _flat_minima(both: Both) -> Section:
    lines, columns = [], []
    xs: list[float] = []
    draws = images = 0
    noise = "filter"
    for label, of in both.of.items():
        names = peers(of, both.run)
        scales = whole(vector(needed(of, "scales")))
        loss = matrix(needed(of, "loss"), len(names), len(scales))
        spread = matrix(needed(of, "spread"), len(names), len(scales))
        if not scales or scales != sorted(set(scales)) or (xs and scales != xs):
            raise Unreadable("scales")
        xs = scales
        draws, images = (int(number(of.get(n)) or 0) for n in ("draws", "images"))
        noise = str(of.get("noise"))
        for k, name in enumerate(names):
            first = loss[k][0]
            rise = [None if v is None or first is None else v - first for v in loss[k]]
            shown = f"{name}, {label}" if len(both.of) > 1 else name
            points = list(zip(scales, rise, strict=True))
            lines.append(Line(shown, _look(both.run, name), points, label == "independent"))
            columns.append([_with_spread(v, s) for v, s in zip(rise, spread[k], strict=True)])
    panel = curves.panel("flatness-rise", "Rise of the loss (nats)", lines, "noise", whole=False)
    if len(panel.head) == len(columns) + 1:
        rows = [[f"{x:.4g}", *cells] for x, *cells in zip(xs, *columns, strict=True)]
        panel = panel._replace(rows=rows)
    of_what = (
        "in units of the root mean square of the weights of a filter"
        if noise == "filter"
        else "of this standard deviation on every weight"
    )
    words = (
        "How much the cross-entropy rises when Gaussian noise is added to the weights, "
        f"{of_what}: less in a flatter minimum. Mean of {draws} draws on {images:,} training images"
        f"{_weights(both)}{_dashes(both)}; ± is the standard deviation over draws."
    )
    title = "How flat the minima are"
    return Section("flatness", title, [words], panels=[panel] if panel.chart else [])


def _loss_sections(both: Both) -> Section:
    of_pair: dict[tuple[str, ...], dict[str, Found]] = {}
    for label, found in both.of.items():
        for of in several(found):
            of_pair.setdefault(tuple(some_peers(of, both.run)), {})[label] = of
    panels, words = [], []
    for place, (names, by_label) in enumerate(list(of_pair.items())[:MOST_PAIRS]):
        losses: list[Line] = []
        hits: list[Line] = []
        for k, (label, of) in enumerate(by_label.items()):
            at = whole(vector(needed(of, "at")))
            look, dashed = peer_look(k), label == "independent"
            for key, unit, lines in (("loss", 1, losses), ("accuracy", 100, hits)):
                values = [None if v is None else unit * v for v in vector(needed(of, key), len(at))]
                points = sorted(dict(zip(at, values, strict=True)).items())
                lines.append(Line(label, look, points, dashed))
            barrier = number(of.get("barrier"))
            if barrier is not None and len(names) > 1:
                words.append(
                    f"Between {' and '.join(names)}, {label}, the loss rises at most "
                    f"{barrier:.3f} nats above the straight line between its ends."
                )
        between = " to ".join(names) if len(names) > 1 else f"{names[0]}, a random direction"
        axis = "0: the first, 1: the second" if len(names) > 1 else "along the direction"
        for key, title, lines in (("loss", "loss (nats)", losses), ("hits", "accuracy (%)", hits)):
            panels.append(
                curves.panel(f"section-{place}-{key}", f"{between}: {title}", lines, axis, False)
            )
    left = len(of_pair) - MOST_PAIRS
    of = several(next(iter(both.of.values())))[0]
    first = (
        f"The loss along straight lines through the weights, on {_images(of)}{_weights(both)}"
        f"{_dashes(both)}. Where it does not rise on the way from one peer to the other, both lie "
        "in one basin."
    )
    more = [f"{left} more pairs are in {ANALYSIS}."] if left > 0 else []
    shown = [panel for panel in panels if panel.chart]
    title = "The loss between the peers"
    return Section("section", title, [first, *words, *more], panels=shown)


def _loss_planes(both: Both) -> Section:
    panels = []
    for label, of in both.of.items():
        names = some_peers(of, both.run)
        x, y = (whole(vector(needed(of, key))) for key in "xy")
        loss = matrix(needed(of, "loss"), len(y), len(x))
        points = matrix(needed(of, "points"), len(names), 2)
        for values in (x, y):
            if len(values) < 2 or values != sorted(set(values)):
                raise Unreadable("x or y")
        x_step, y_step = (math.ceil(len(values) / MOST_SIDE) for values in (x, y))
        x, y = x[::x_step], y[::y_step]
        if min(len(x), len(y)) < 2:
            raise Unreadable("x or y")
        loss = [row[::x_step] for row in loss[::y_step]]
        there = [v for row in loss for v in row if v is not None]
        if not there:
            continue
        span = f"from {number_text(min(there))}, pale, to {number_text(max(there))} nats, dark"
        title = f"{_titled('Loss', label, both)}: {span}"
        marked = [
            (name, _look(both.run, name), a, b)
            for name, (a, b) in zip(names, points, strict=True)
            if a is not None and b is not None
        ]
        chart = plane_chart(
            f"plane-{label}", title, f"through {', '.join(names)}", x, y, loss, marked
        )
        rows = [
            [f"{at:.4g}", *(number_text(v) for v in row)] for at, row in zip(y, loss, strict=True)
        ]
        panels.append(Panel(title, chart, ["y \\ x", *(f"{at:.4g}" for at in x)], rows))
    of = next(iter(both.of.values()))
    words = (
        f"The loss over the plane of weights through the peers, on {_images(of)}{_weights(both)}, "
        "in shades of equal ratios. The marks are the peers, as in the legend of the curves."
    )
    return Section("plane", "The loss around the peers", [words], panels=panels)


def _alignment(both: Both) -> Section:
    heats = []
    for label, of in both.of.items():
        names = peers(of, both.run)
        layers = texts(needed(of, "layers"))
        cubes = needed(of, "alignment")
        if not isinstance(cubes, list) or len(cubes) != len(layers) or not layers:
            raise Unreadable("alignment")
        every = list(zip(layers, cubes, strict=True))
        heats += [
            _heat(_titled(layer, label, both), names, values, 1)
            for layer, values in every[-MOST_LAYERS:]
        ]
    of = next(iter(both.of.values()))
    words = (
        "Centred kernel alignment (linear) of the features that two peers have at a layer, from 0, "
        f"unlike, to 1, the same but for rotation and scale; on {_images(of)}{_weights(both)}."
    )
    title = "How alike the features are"
    return Section("alignment", title, [words], heats=heats)


def _scaled(both: Both) -> Scaled | None:
    of = both.of.get(both.run.label)
    if of is None:
        return None
    names = peers_and_ensemble(of, both.run, ENSEMBLE)
    ece, nll = (vector(needed(of, f"scaled_{key}"), len(names)) for key in ("ece", "nll"))
    temperatures = matrix(needed(of, "temperatures"), len(names), 2)
    weights = _weights(Both(both.run, {both.run.label: of}))
    note = (
        "Scaled: after dividing the logits by one temperature, which keeps every answer. Each half "
        f"of the images is scaled by the temperature that fits the other half best{weights}."
    )
    found = {
        name: (
            "–" if e is None else f"{100 * e:.2f}",
            "–" if n is None else f"{n:.4f}",
            " and ".join("–" if t is None else f"{t:.3f}" for t in pair),
        )
        for name, e, n, pair in zip(names, ece, nll, temperatures, strict=True)
    }
    return Scaled(note, found)


def _heat(title: str, names: list[str], values: Any, unit: float) -> Heat:
    found = matrix(values, len(names), len(names))
    pairs = [abs(v) for i, row in enumerate(found) for j, v in enumerate(row) if v and i != j]
    top = max(pairs, default=0.0) or 1.0
    rows = []
    for i, (name, row) in enumerate(zip(names, found, strict=True)):
        cells: list[tuple[str, float | None]] = []
        for j, v in enumerate(row):
            if v is None or i == j:
                cells.append(("–", None))
            else:
                text = f"{unit * v:.{1 if unit == 100 else 3}f}".replace("-", "−")
                cells.append((text, round(max(v, 0.0) / top, 3)))
        rows.append((name, cells))
    return Heat(title, rows)


def _titled(title: str, label: str, both: Both) -> str:
    return f"{title}, {label}" if len(both.of) > 1 else title


def _look(run: RunFiles, name: str) -> str:
    return peer_look(run.peers.index(name)) if name in run.peers else ENSEMBLE


def _with_spread(value: float | None, spread: float | None) -> str:
    return number_text(value) + (f" ± {number_text(spread)}" if spread else "")


def _weights(both: Both) -> str:
    """Which weights, where the analysis says so and all agree."""
    first, *others = [_one(of).get("weights") for of in both.of.values()]
    same = first in ("last", "best") and all(one == first for one in others)
    return f", of the {first} weights" if same else ""


def _dashes(both: Both) -> str:
    return " (solid: mutual, dashed: independent)" if len(both.of) > 1 else ""


def _images(of: Found) -> str:
    return f"{int(number(of.get('images')) or 0):,} {_set_of(of)} images"


def _set_of(of: Found) -> str:
    said = next((of[key] for key in ("set", "images_of") if key in of), "training")
    return said if said in ("training", "test", "validation") else "training"


def _one(found: Any) -> Found:
    return table(found[0] if isinstance(found, list) and found else found)
