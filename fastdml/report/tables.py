"""Tables of a run's scores, as text in columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastdml.report.scoring import Scoring
from fastdml.units import percent


def summary_table(summary: dict[str, Any], scoring: Scoring) -> str:
    """Independent against mutual training, as papers compare them: the headline scores in %; of
    mutual training alone where there was no other."""
    runs = ("independent", "mutual") if summary["independent"] else ("mutual",)
    rate = _rate(summary["mutual"])
    entries = [score.entry for score in scoring.headlines]
    prefixes = [f"{score.label} " for score in scoring.headlines]
    if len(prefixes) == 1:  # a single run needs no label
        prefixes = [""]
    rows = [
        (
            "peer",
            "parameters",
            *(f"{prefix}{run} %" for prefix in prefixes for run in runs),
            f"{prefixes[0]}ensemble %",
            "images/s",
        )
    ]
    rows += [
        (
            peer["name"],
            f"{peer['parameters']:,}",
            *(percent(peer[f"{x}_{run}"]) for x in entries for run in runs),
            percent(_ensemble(summary, scoring, k)),
            rate,
        )
        for k, peer in enumerate(summary["peers"])
    ]
    note = f"ensemble: {scoring.ensemble}"
    if summary["config"].get("groups", 1) > 1:
        note += ", of each group"
    if summary["independent"]:
        note += (
            f" (independent peers': {percent(summary['ensemble_independent'])} %)"
            f"; images/s: all peers together (independent:"
            f" {_rate(summary['independent'])})"
        )
    else:
        note += "; images/s: all peers together"
    return "\n".join([fixed_columns(rows), *_chosen(summary), *_stopped(summary), note])


def _ensemble(summary: dict[str, Any], scoring: Scoring, k: int) -> float:
    """That of the group of peer k."""
    scores = summary["mutual"]["best_scores" if _is_chosen(summary) else "scores"] or {}
    each = scores.get(f"group_{scoring.leading}")
    return each[k] if each else summary["ensemble_mutual"]


def _is_chosen(summary: dict[str, Any]) -> bool:
    return summary.get("chosen_on") == "validation"


def _chosen(summary: dict[str, Any]) -> list[str]:
    """Which weights the table is of, where it is not of the last."""
    if not _is_chosen(summary):
        return []
    runs = {run: summary[run] for run in ("mutual", "independent") if summary[run]}
    epochs = ", ".join(
        f"{values['best_epoch']:g}" + (f" ({run})" if len(runs) > 1 else "")
        for run, values in runs.items()
    )
    scores = "test scores" if summary["scored_on"] == "test" else "validation scores (no test set)"
    return [f"{scores} of the weights that the validation images chose: of epoch {epochs}"]


def _stopped(summary: dict[str, Any]) -> list[str]:
    return [
        f"{run} training stopped early, after epoch {summary[run]['epochs']:g}: {reason}"
        for run in ("mutual", "independent")
        if summary[run] and (reason := summary[run].get("stopped"))
    ]


def fixed_columns(rows: Sequence[Sequence[str]], text: Collection[int] = (0,)) -> str:
    """Rows in columns: those whose numbers are in `text` to the left, others, which hold numbers,
    to the right; a rule under row 0."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _rate(run: dict[str, Any]) -> str:
    rate = run["images_per_second"]
    return f"{rate:,.0f}" if rate else "-"  # 0: the run was too short to tell
