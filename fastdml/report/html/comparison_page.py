"""The page of several runs side by side: scores, curves over one another, settings that differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastdml import __version__
from fastdml.names import unique
from fastdml.report.html import curves, headline
from fastdml.report.html.charts import legend_mark, peer_look
from fastdml.report.html.curves import Key, Panel
from fastdml.report.html.headline import Shown, score_text, score_title
from fastdml.report.html.render import render
from fastdml.report.html.run_page import value_text
from fastdml.report.run_files import OWN_IMAGES, PLACES, RunFiles, data_text, number, numbers
from fastdml.report.scoring import Scoring
from fastdml.units import duration


class Row(NamedTuple):
    name: str
    cells: list[str]


def comparison_page(
    runs: Sequence[RunFiles], scorings: Sequence[Scoring], *, weights: str | None = None
) -> str:
    """The HTML of several runs. scorings: one a run. weights: as of `run_page`."""
    names = unique([run.name for run in runs])
    shown = [
        Shown(run, headline.shown_weights(run, weights), scoring.headlines, scoring.ensemble)
        for run, scoring in zip(runs, scorings, strict=True)
    ]
    head, rows = _scores(names, shown)
    return render(
        "comparison.html",
        title=f"{len(runs)} runs – fastdml report",
        runs=list(zip(names, runs, strict=True)),
        head=head,
        rows=rows,
        seeds=_over_seeds(shown),
        curves=_panels(names, shown),
        legend=[Key(legend_mark(peer_look(k)), name) for k, name in enumerate(names)],
        names=names,
        differences=differences(runs),
        problems=[problem for run in runs for problem in run.problems],
        made=f"fastdml {__version__}",
    )


def differences(runs: Sequence[RunFiles]) -> list[Row]:
    """The settings that are not the same in all runs; "–" where a run does not have one."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    own = any(run.settings.get("data") in OWN_IMAGES for run in runs)
    places = PLACES - {"root"} if own else PLACES
    rows = []
    for name in names:
        values = [value_text(r.settings[name]) if name in r.settings else "–" for r in runs]
        if name not in places and len(set(values)) > 1:
            rows.append(Row(name, values))
    return rows


def _scores(names: Sequence[str], shown: Sequence[Shown]) -> tuple[list[str], list[Row]]:
    """A row a run; the scores are those that any of the runs leads with."""
    leading = dict.fromkeys(
        score.name for one in shown for score in one.headlines if score.name in one.scores
    )
    head = ["data", "peers", "weights", "scores on"]
    for name in leading:
        title = score_title(name)
        head += [f"mean of the peers, {title}", f"best peer, {title}", f"ensemble, {title}"]
        if any(one.alone for one in shown):
            head.append(f"independent, mean, {title}")
    head += ["epochs", "images/s", "time"]
    rows = []
    for label, one in zip(names, shown, strict=True):
        run, phase = one.run, one.run.phase
        cells = [
            data_text(run.settings),
            value_text(run.settings.get("peers", run.peers)),
            _weights_text(one),
            headline.cases_text(one) if one.scores else "–",
        ]
        for name in leading:
            values = _there(one.scores, name, len(run.peers))
            cells += [
                score_text(name, sum(values) / len(values) if values else None),
                score_text(name, max(values, default=None)),
                score_text(name, number(one.scores.get(f"ensemble_{name}"))),
            ]
            if any(other.alone for other in shown):
                alone = _there(one.alone, name, len(run.peers))
                cells.append(score_text(name, sum(alone) / len(alone) if alone else None))
        rate, seconds = number(phase.get("images_per_second")), number(phase.get("wall_seconds"))
        cells += [
            f"{run.epochs:.4g}" + ("" if run.ended else ", not ended"),
            f"{rate:,.0f}" if rate else "–",
            duration(seconds) if seconds else "–",
        ]
        rows.append(Row(label, cells))
    return head, rows


def _weights_text(one: Shown) -> str:
    if not one.run.ended:
        return "of the last evaluation so far"
    return f"best, chosen on {one.run.chosen_on}" if one.weights == "best" else "last"


def _over_seeds(shown: Sequence[Shown]) -> list[str]:
    """Mean and spread, where runs that have ended differ in nothing but the seed."""
    runs = [one.run for one in shown]
    if {row.name for row in differences(runs)} != {"seed"} or not all(run.ended for run in runs):
        return []
    if len({value_text(run.settings.get("seed")) for run in runs}) < len(runs):
        return []
    if len({headline.cases_text(one) for one in shown}) > 1:  # not of the same images
        return []
    found = []
    for score in shown[0].headlines:
        title = score_title(score.name).removesuffix(" (%)")
        ensemble = f"ensemble_{score.name}"
        for kind, unit, values in (
            (f"{title}, mean of the peers", "%", [_mean(s.scores, score.name, s) for s in shown]),
            (f"{title}, ensemble", "%", [number(s.scores.get(ensemble)) for s in shown]),
            (
                f"{title}, mutual less independent, mean of the peers",
                "points",
                [_gap(s, score.name) for s in shown],
            ),
        ):
            there = [v for v in values if v is not None]
            if len(there) == len(shown):
                mean, spread = statistics.mean(there), statistics.stdev(there)
                found.append(f"{kind}: {100 * mean:.2f} ± {100 * spread:.2f} {unit}")
    return found


def _panels(names: Sequence[str], shown: Sequence[Shown]) -> list[Panel]:
    runs = {name: one.run for name, one in zip(names, shown, strict=True)}
    trained = {name: curves.trained(run, "ce") for name, run in runs.items()}
    evaluated = {name: curves.evaluations(run)[1] for name, run in runs.items()}
    title = "Mean of the peers: training cross-entropy (nats)"
    panels = [curves.runs_panel("curve-ce", title, trained, "ce")]
    for name, title in dict.fromkeys((s.name, s.title) for one in shown for s in one.headlines):
        kinds = {curves.evaluations(one.run)[0] for one in shown if name in one.scores}
        images = " and ".join(sorted(kinds))
        for who, key in (("Mean of the peers", name), ("Ensemble", f"ensemble_{name}")):
            panels.append(
                curves.runs_panel(
                    f"curve-{key}", f"{who}: {images} {title} (%)", evaluated, key, 100.0
                )
            )
    return [panel for panel in panels if panel.chart]


def _there(scores: Mapping[str, Any], name: str, K: int) -> list[float]:
    return [v for v in numbers(scores.get(name), K) if v is not None]


def _mean(scores: Mapping[str, Any], name: str, one: Shown) -> float | None:
    values = _there(scores, name, len(one.run.peers))
    return sum(values) / len(values) if values else None


def _gap(one: Shown, name: str) -> float | None:
    a, b = _mean(one.scores, name, one), _mean(one.alone, name, one)
    return None if a is None or b is None else a - b
