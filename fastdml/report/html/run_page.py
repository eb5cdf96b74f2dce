"""The page of one run: everything the template shows, as plain values and finished charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastdml import __version__
from fastdml.report.html import curves, from_analyses, from_predictions, headline
from fastdml.report.html.curves import Panel
from fastdml.report.html.headline import Shown
from fastdml.report.html.render import render
from fastdml.report.metrics_log import TEACHER_KL
from fastdml.report.plots import pairwise_spans
from fastdml.report.run_files import PLACES, RunFiles, number, numbers, table
from fastdml.report.scoring import Scoring
from fastdml.report.summary import versions
from fastdml.units import duration, size

RANKS = (1, 5, 10, 20, 50)


def run_page(
    run: RunFiles,
    scoring: Scoring,
    *,
    defaults: Mapping[str, Any] | None = None,
    weights: str | None = None,
    remedy: str = "",
    analyses: Mapping[str, Any] | None = None,
    alone: Mapping[str, Any] | None = None,
) -> str:
    """The HTML of a run. defaults: the settings of its data set as they are without any choice,
    None where nobody knows. weights: "last" or "best", by default the best if a validation set
    chose them. remedy: how a run without predictions gets them. analyses, alone: of the run, and of
    its independent peers, by their name, in the form of analysis.json; those unknown are passed
    over."""
    together = scoring.ensemble + ", of each group, their mean" * (run.groups > 1)
    shown = Shown(run, headline.shown_weights(run, weights), scoring.headlines, together)
    found = run.predictions
    analysed, problems = from_analyses.sections(run, analyses or {}, alone or {})
    values = {
        "title": f"{run.name} – fastdml report",
        "run": run,
        "shown": shown,
        "state": _state(run),
        "problems": [*run.problems, *problems],
        "table": headline.table_of(shown),
        "sentences": headline.sentences(shown),
        "curves": curves.training(run, scoring.headlines),
        "cmc": _cmc(shown),
        "legend": curves.legend(run),
        "spans": _spans(run),
        "throughput": curves.throughput(run),
        "by_class": from_predictions.by_class(shown),
        "ends": from_predictions.ends,
        "analysed": analysed,
        "settings": settings(run, defaults),
        "environment": _environment(run),
        "remedy": remedy,
        "images": run.scored_on,
        "keeps_predictions": scoring.keeps_predictions,
        "of_weights": _of_weights(shown),
        "made": f"fastdml {__version__}",
    }
    if found is not None:
        values |= {
            "confusion": from_predictions.confusion_table(found),
            "diagrams": from_predictions.diagrams(found),
            "pictures": from_predictions.disputed(found),
            "true_colours": found.true_colours,
        }
    return render("run.html", **values)


def settings(
    run: RunFiles, defaults: Mapping[str, Any] | None
) -> list[tuple[str, str, str | None]]:
    """(name, value, the default where it is another): what was changed first."""
    rows = []
    for name, value in run.settings.items():
        default = None
        if defaults is not None and name in defaults and name not in PLACES:
            default = value_text(defaults[name])
        text = value_text(value)
        rows.append((name, text, default if default != text else None))
    return sorted(rows, key=lambda row: row[2] is None)


def value_text(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _state(run: RunFiles) -> str:
    """What to know of a run that has not ended; empty for one that has."""
    if run.ended:
        return ""
    planned = number(run.settings.get("epochs"))
    of = f" of {planned:g}" if planned else ""
    if not run.records[1:]:
        return "This run has not ended: it has logged nothing yet."
    return (
        f"This run has not ended: it stands at epoch {run.epochs:.4g}{of}. It may still be "
        "training; one that was interrupted goes on with resume. Make the page again then."
    )


def _of_weights(shown: Shown) -> str:
    """Whose predictions the sections below the result are of."""
    run, found = shown.run, shown.run.predictions
    if found is None:
        return ""
    if found.weights == shown.weights or headline.last_is_best(run):
        return f"of the {shown.weights} weights"
    return f"of the {found.weights} weights, while the table above is of the {shown.weights} ones"


def _spans(run: RunFiles) -> list[dict[str, Any]]:
    """The pairwise KL divergences over spans of training, and at its last reading."""
    if len(run.peers) < 2:
        return []
    found = []
    for label, part in curves.phases(run).items():
        readings = [r for r in part.records if _is_matrix(r.get("pairwise_kl"))]
        spans = pairwise_spans(readings)
        if readings and len(spans) > 1:
            matrix = [
                [math.nan if i == j or v is None else v for j, v in enumerate(row)]
                for i, row in enumerate(readings[-1]["pairwise_kl"])
            ]
            if _kl_texts(matrix) != _kl_texts(spans[-1][1]):  # a span may be that reading alone
                spans.append((f"last reading, epoch {readings[-1]['epoch']:.4g}", matrix))
        found += [(label, *span) for span in spans]
    values = [v for *_, m in found for row in m for v in row if math.isfinite(v)]
    top = max(values, default=0.0) or 1.0
    several = run.independent is not None
    return [
        {
            "phase": label,
            "title": f"{label}, {span}" if several else span,
            "rows": [
                (
                    name,
                    [(_kl_text(v), round(v / top, 3) if math.isfinite(v) else None) for v in row],
                )
                for name, row in zip(run.peers, matrix, strict=True)
            ],
        }
        for label, span, matrix in found
    ]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(v is None or number(v) is not None for v in row)
        for row in value
    )


def _kl_texts(matrix: Sequence[Sequence[float]]) -> list[list[str]]:
    return [[_kl_text(v) for v in row] for row in matrix]


def _kl_text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _cmc(shown: Shown) -> Panel | None:
    """The cumulative match curve: how often a match is among the first ranks."""
    scores, peers = shown.scores, shown.run.peers
    ranks = [k for k in RANKS if scores.get(f"rank{k}")]
    if len(ranks) < 2:
        return None
    lines = [
        curves.Line(
            name,
            curves.peer_look(k),
            [(float(r), _share(numbers(scores[f"rank{r}"], len(peers))[k])) for r in ranks],
        )
        for k, name in enumerate(peers)
    ]
    if len(peers) > 1:
        values = [(float(r), _share(number(scores.get(f"ensemble_rank{r}")))) for r in ranks]
        lines.append(curves.Line(curves.ENSEMBLE, curves.ENSEMBLE, values))
    title = "Queries with a match among the first ranks (%)"
    return curves.panel("curve-cmc", title, lines, "rank")


def _share(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _teachers(run: RunFiles) -> list[tuple[str, str]]:
    """Each teacher, with how far the peers were from it at the last reading."""
    readings = [r for r in run.records if any(key.startswith(TEACHER_KL) for key in r)]
    found = []
    for key, values in (readings[-1] if readings else {}).items():
        if key.startswith(TEACHER_KL):
            apart = numbers(values, len(run.peers))
            each = (
                f"{name} {_kl_text(math.nan if v is None else v)}"
                for name, v in zip(run.peers, apart, strict=True)
            )
            found.append((f"KL from teacher {key.removeprefix(TEACHER_KL)}", ", ".join(each)))
    return found


def _training_images(phase: Mapping[str, Any]) -> str | None:
    """How many have labels and how many do not, where the run tells."""
    found = table(phase.get("training_images"))
    labelled, unlabelled = (number(found.get(name)) for name in ("labelled", "unlabelled"))
    if labelled is None:
        return None
    without = f", {unlabelled:,.0f} without" if unlabelled else ""
    return f"{labelled:,.0f} with labels{without}"


def _mesh(phase: Mapping[str, Any]) -> str | None:
    """The ranks of a run on several devices, and what they told each other of their peers."""
    found = table(phase.get("mesh"))
    rows, columns, sent = (number(found.get(n)) for n in ("peer", "data", "bytes_a_step"))
    if rows is None or columns is None:
        return None
    exchanged = f"; {size(sent)} of logits, distances or weights a step" if sent else ""
    return f"peer={rows:.0f},data={columns:.0f}{exchanged}"


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    """What the run ran on, as far as its summary tells."""
    summary, phase = run.summary, run.phase
    seconds, rate = number(phase.get("wall_seconds")), number(phase.get("images_per_second"))
    skipped = number(phase.get("skipped_steps"))
    wait = number(phase.get("data_wait"))
    rows = [
        ("folder", str(run.folder)),
        ("command", summary.get("command")),
        ("ended", summary.get("date")),
        ("stopped early", phase.get("stopped")),
        ("independent peers stopped early", table(summary.get("independent")).get("stopped")),
        *_teachers(run),
        ("training images", _training_images(phase)),
        ("device", summary.get("device")),
        ("mesh", _mesh(phase)),
        ("precision", phase.get("precision")),
        ("execution of the steps", summary.get("execution")),
        ("threads of the steps", summary.get("threads")),
        ("training and evaluation", duration(seconds) if seconds else None),
        ("speed", f"{rate:,.0f} images/s, all peers together" if rate else None),
        ("waiting for data", f"{100 * wait:.1f} % of the time" if wait is not None else None),
        ("steps skipped, fp16 overflow", f"{skipped:,.0f}" if skipped else None),
        *((f"version of {n}", v) for n, v in table(summary.get("versions")).items()),
        ("this page", f"by fastdml {__version__}, Python {versions()['python']}"),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]
