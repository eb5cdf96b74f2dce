"""Tables of a run's scores, as text in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdml.report.summary import HEADLINES, kind_of
from fastdml.units import percent

ENSEMBLES = {
    "top1": "mean of the mutual peers' probabilities",
    "mAP": "the mutual peers' features, concatenated",
}


def summary_table(summary: dict[str, Any]) -> str:
    """The comparison every paper's table makes: accuracies in % of the test set, or mAP and rank-1
    in % over the queries."""
    kind = kind_of(summary["mutual"]["scores"])
    ensemble = percent(summary["ensemble_mutual"])
    rate = _rate(summary["mutual"])
    labels = [label for _, label in HEADLINES[kind]]
    prefixes = ("",) if kind == "top1" else ("mAP ", "rank-1 ")
    rows = [
        (
            "peer",
            "parameters",
            *(f"{prefix}{run} %" for prefix in prefixes for run in ("independent", "mutual")),
            f"{prefixes[0]}ensemble %",
            "images/s",
        )
    ]
    rows += [
        (
            peer["name"],
            f"{peer['parameters']:,}",
            *(percent(peer[f"{x}_{run}"]) for x in labels for run in ("independent", "mutual")),
            ensemble,
            rate,
        )
        for peer in summary["peers"]
    ]
    note = f"ensemble: {ENSEMBLES[kind]}"
    if summary["independent"]:
        note += (
            f" (independent peers': {percent(summary['ensemble_independent'])} %)"
            f"; images/s: all peers together (independent:"
            f" {_rate(summary['independent'])})"
        )
    else:
        note += "; images/s: all peers together"
    return f"{fixed_columns(rows)}\n{note}"


def retrieval_table(names: Sequence[str], scores: dict[str, dict[str, Any] | None]) -> str:
    """Every score of each peer and of the ensemble, a block of rows a protocol, from
    `Retrieval.all_scores` with RetrievalScores as dicts."""
    columns = ("rank1", "rank5", "rank10", "mAP", "mINP")
    rows = [("peer", "query", "re-ranked", "rank-1 %", "rank-5 %", "rank-10 %", "mAP %", "mINP %")]
    for protocol, values in scores.items():
        query, _, reranked = protocol.partition("_")
        if values is None:
            continue
        kind = (query, "yes" if reranked else "no")
        for k, name in enumerate(names):
            rows.append((name, *kind, *(percent(values[c][k]) for c in columns)))
        ensemble = (percent(values[f"ensemble_{c}"]) for c in columns)
        rows.append(("ensemble", *kind, *ensemble))
    note = f"{scores['single']['queries']:,} queries; ensemble: the peers' features, concatenated"
    if scores["multi"] is None:
        note += "; no multiple queries: the folder gt_bbox is not there"
    return f"{fixed_columns(rows)}\n{note}"


def scores_table(names: Sequence[str], scores: dict[str, Any]) -> str:
    """Every score of each peer and of the ensemble, from a ClassificationScores as a dict."""
    columns = ("top1", "top5", "ece", "nll", "entropy")
    rows = [("peer", "top-1 %", "top-5 %", "ECE %", "NLL nats", "entropy nats")]
    per_peer = [[scores[c][k] for c in columns] for k in range(len(names))]
    per_peer.append([scores[f"ensemble_{c}"] for c in columns])
    for name, (top1, top5, ece, nll, entropy) in zip([*names, "ensemble"], per_peer, strict=True):
        rows.append(
            (name, percent(top1), percent(top5), percent(ece), f"{nll:.4f}", f"{entropy:.4f}")
        )
    table = f"{fixed_columns(rows)}\n{scores['rows']:,} test images"
    broken = [f"{n}: {bad}" for n, bad in zip(names, scores["nonfinite"], strict=True) if bad]
    return table + (f"; outputs that are not finite: {', '.join(broken)}" if broken else "")


def fixed_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first to the left, numbers to the right, a rule under row 0."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _rate(run: dict[str, Any]) -> str:
    rate = run["images_per_second"]
    return f"{rate:,.0f}" if rate else "-"  # 0: the run was too short to tell
