"""The result of a run first: a table of scores, and what they do and do not say, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdml.report.html.curves import ENSEMBLE, evaluations
from fastdml.report.predictions import Predictions
from fastdml.report.run_files import RunFiles, data_text, number, numbers, table
from fastdml.report.scoring import Headline
from fastdml.report.statistics import (
    Interval,
    binomial_interval,
    comparable,
    paired_interval,
    right,
)

IN_NATS = {"nll": "NLL (nats)", "entropy": "entropy (nats)"}
TITLES = {"top1": "top-1", "top5": "top-5", "ece": "calibration error"}  # of others, their names
NAMED_PEERS = 3  # more, of teachers too, are summed up in a sentence


class Cell(NamedTuple):
    text: str
    below: str = ""  # smaller: an interval


@dataclass(frozen=True)
class HeadlineTable:
    caption: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]  # a peer's name and its cells


@dataclass(frozen=True)
class Shown:
    """Which scores of a run are shown."""

    run: RunFiles
    weights: str  # "last" or "best"
    headlines: Sequence[Headline]
    ensemble: str  # what the ensemble is

    @property
    def scores(self) -> dict[str, Any]:
        return self.run.scores(self.weights)

    @property
    def alone(self) -> dict[str, Any]:
        """The independent run's."""
        return self.run.independent.scores(self.weights) if self.run.independent else {}

    @property
    def both(self) -> tuple[Predictions, Predictions] | None:
        """Predictions of the same images, mutual and independent."""
        other = self.run.independent
        a, b = self.run.predictions, other.predictions if other else None
        return (a, b) if a is not None and b is not None and comparable(a, b) else None

    @property
    def pairs(self) -> tuple[Predictions, Predictions] | None:
        """The same, where they are of the weights whose scores are shown."""
        both = self.both
        return both if both is not None and both[0].weights == self.weights else None

    def cases(self, name: str, scores: Mapping[str, Any] | None = None) -> int:
        """The number of images or queries that a score is the share of; 0: it is no share. scores:
        in which the number stands, by default those that are shown."""
        field = next((score.cases for score in self.headlines if score.name == name), "")
        return int(number((self.scores if scores is None else scores).get(field)) or 0)


def shown_weights(run: RunFiles, asked: str | None) -> str:
    """The best weights where a validation set chose them, else the last."""
    return asked or ("best" if run.chosen_on == "validation" else "last")


def last_is_best(run: RunFiles) -> bool:
    """Whether the last weights are the best ones."""
    return run.ended and number(run.phase.get("best_epoch")) == run.epochs


def score_title(name: str) -> str:
    """With its unit."""
    if name in IN_NATS:
        return IN_NATS[name]
    if name.startswith("tpr_"):  # tpr_1e4: at a false positive rate of 1e-4
        return f"TPR at FPR {name[4:].replace('e', 'e-')} (%)"
    label = TITLES.get(name, name.replace("rank", "rank-") if name[-1:].isdigit() else name)
    return f"{label} (%)"


def score_text(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if name in IN_NATS else f"{100 * value:.2f}"


def score_names(scores: Mapping[str, Any]) -> list[str]:
    """The scores that peers and ensemble have, in order; an earlier version's are fewer."""
    return [n for n, v in scores.items() if isinstance(v, list) and v and f"ensemble_{n}" in scores]


def table_of(shown: Shown) -> HeadlineTable | None:
    """None where nothing was evaluated."""
    run, scores, alone = shown.run, shown.scores, shown.alone
    if not scores:
        return None
    rows = [*run.peers, ENSEMBLE] if len(run.peers) > 1 else list(run.peers)
    head, columns = [], []
    leading = [score.name for score in shown.headlines if score.name in scores]
    for name in leading:
        if alone:
            head += [
                f"independent {score_title(name)}",
                f"mutual {score_title(name)}",
                "gain (points)",
            ]
            columns += [
                _scores(shown, alone, name, rows),
                _scores(shown, scores, name, rows),
                _gains(shown, name, rows),
            ]
        else:
            head.append(score_title(name))
            columns.append(_scores(shown, scores, name, rows))
    prefix = "mutual " if alone else ""
    for name in score_names(scores):
        if name not in (*leading, "entropy", "nonfinite"):
            head.append(f"{prefix}{score_title(name)}")
            columns.append([Cell(c.text) for c in _scores(shown, scores, name, rows)])
    if counts := _parameters(run):
        head.append("parameters")
        columns.append([Cell(counts[k]) if k < len(counts) else Cell("") for k in range(len(rows))])
    cells = [list(row) for row in zip(*columns, strict=True)]
    small = "; below a score its 95 % interval" if any(map(shown.cases, leading)) else ""
    caption = f"Scores on {cases_text(shown)}{small}. Ensemble: {shown.ensemble}."
    return HeadlineTable(caption, head, list(zip(rows, cells, strict=True)))


def sentences(shown: Shown) -> list[str]:
    """What the table says, and what it cannot."""
    run = shown.run
    if not shown.scores or not shown.headlines:
        return [
            "Nothing was evaluated: this run had no evaluation data, or has not come to its first "
            "evaluation. The curves show how the losses went."
        ]
    found = [_result(shown)]
    if shown.alone:
        found.append(_comparison(shown))
    found.append(_ensemble(shown) if len(run.peers) > 1 else "")
    found.append(_weights(shown))
    found.append(_seed(shown))
    return [sentence for sentence in found if sentence]


def interval_text(interval: Interval, digits: int = 2) -> str:
    if not all(map(math.isfinite, interval)):
        return ""
    low, high = (f"{100 * v:.{digits}f}" for v in interval)
    return f"{low}\u2009–\u2009{high}"  # thin spaces


def _result(shown: Shown) -> str:
    lead, run = shown.headlines[0], shown.run
    label = score_title(lead.name).removesuffix(" (%)")
    mutual = _values_text(numbers(shown.scores.get(lead.name), len(run.peers)))
    where = f"{label} on {cases_text(shown)}"
    data = data_text(run.settings)
    if run.label != "mutual":
        return f"Each trained by itself on {data}, the peers reach {mutual} {where}."
    taught = ""
    if teachers := run.teachers:
        few = len(teachers) <= NAMED_PEERS
        taught = f"taught by {' and '.join(teachers) if few else f'{len(teachers)} teachers'}"
    if len(run.peers) == 1:
        how = taught or "trained from the labels alone"
        text, alone = f"One peer, {how} on {data}, reaches {mutual} {where}", "by itself"
    else:
        how = f", {taught}" if taught else ""
        text = f"Trained together on {data}{how}, the peers reach {mutual} {where}"
        alone = "each by itself"
    if shown.alone:
        other = _values_text(numbers(shown.alone.get(lead.name), len(run.peers)))
        text += f"; {alone}, from the same start on the same batches, {other}"
    return f"{text}."


def _comparison(shown: Shown) -> str:
    lead, K = shown.headlines[0], len(shown.run.peers)
    pairs = zip(
        numbers(shown.scores.get(lead.name), K), numbers(shown.alone.get(lead.name), K), strict=True
    )
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    if not gaps:
        return ""
    taught = bool(shown.run.teachers)
    others = ["from each other"] if K > 1 or not taught else []
    others += ["from teachers"] if taught else []
    mean = _points(sum(gaps) / len(gaps))
    text = f"Learning {' and '.join(others)} changed that by {mean} on average"
    if shown.pairs is None or lead.name != "top1":
        return f"{text}."
    a, b = (right(found)[:-1].mean(axis=0) for found in shown.pairs)
    interval = paired_interval(a, b)
    text += f" (95 % interval {_points(interval.low, '')} to {_points(interval.high, '')})"
    if interval.low <= 0 <= interval.high:
        return f"{text}: the choice of test images alone could account for that."
    return f"{text}: more than the choice of test images accounts for."


def _ensemble(shown: Shown) -> str:
    lead = shown.headlines[0].name
    value = number(shown.scores.get(f"ensemble_{lead}"))
    if value is None:
        return ""
    if shown.run.groups > 1:
        return (
            f"Their {shown.run.groups} ensembles, one a group, reach a mean of {100 * value:.2f} %."
        )
    text = f"Their ensemble reaches {100 * value:.2f} %"
    if interval := interval_text(binomial_interval(value, shown.cases(lead))):
        text += f" (95 % interval {interval})"
    return f"{text}."


def _weights(shown: Shown) -> str:
    run = shown.run
    if not run.ended:
        return "These are the scores of the last evaluation so far."
    if shown.weights == "last":
        text = "These are the weights after the last epoch, which no score has chosen"
        if run.scored_on == "validation":
            text += "; the images are those of the validation set, for there is no test set"
        return f"{text}."
    epoch = number(run.phase.get("best_epoch"))
    which = f"These are the weights of epoch {epoch:.4g}" if epoch else "These are the best weights"
    if run.scored_on == "validation":
        return (
            f"{which}, chosen on the validation images that these scores are of, for there is no "
            "test set: they flatter."
        )
    if run.chosen_on == "validation":
        return f"{which}, chosen on validation images; the test images were read once, at the end."
    count = len(evaluations(run)[1])
    return f"{which}, the best of {count} evaluations on these same test images: they flatter."


def _seed(shown: Shown) -> str:
    seed = shown.run.settings.get("seed")
    given = f" ({seed})" if type(seed) is int else ""
    what = (
        "the intervals tell how far other images of the same kind could move a score, not how far "
        "another seed would"
        if any(shown.cases(score.name) for score in shown.headlines)
        else "nothing here tells how far another seed would move these scores"
    )
    return (
        f"It is one run from one seed{given}: {what}. For that, train with several seeds and give "
        "all their folders to fastdml report."
    )


def _scores(shown: Shown, scores: Mapping[str, Any], name: str, rows: Sequence[str]) -> list[Cell]:
    K = len(shown.run.peers)
    values = numbers(scores.get(name), K)
    if len(rows) > K:
        values.append(number(scores.get(f"ensemble_{name}")))
    n = shown.cases(name, scores)
    return [
        Cell(
            score_text(name, v),
            "" if v is None else interval_text(binomial_interval(v, n)),
        )
        for v in values
    ]


def _gains(shown: Shown, name: str, rows: Sequence[str]) -> list[Cell]:
    K = len(shown.run.peers)
    mutual, alone = (
        [*numbers(s.get(name), K), number(s.get(f"ensemble_{name}"))]
        for s in (shown.scores, shown.alone)
    )
    cells = []
    for k in range(len(rows)):
        a, b = mutual[k], alone[k]
        if a is None or b is None:
            cells.append(Cell("–"))
            continue
        below = ""
        if name == "top1" and shown.pairs is not None:
            hits = [right(found)[k] for found in shown.pairs]
            low, high = paired_interval(*hits)
            below = f"{_points(low, '')} to {_points(high, '')}"
        cells.append(Cell(_points(a - b, ""), below))
    return cells


def _parameters(run: RunFiles) -> list[str]:
    peers = run.summary.get("peers")
    if not isinstance(peers, list):
        return []
    counts = [number(table(peer).get("parameters")) for peer in peers]
    return ["–" if count is None else f"{count:,.0f}" for count in counts[: len(run.peers)]]


def cases_text(shown: Shown) -> str:
    run = shown.run
    rows, queries = (number(shown.scores.get(name)) for name in ("rows", "queries"))
    if queries is not None:
        return f"{queries:,.0f} queries"
    where = f"{run.scored_on} images"
    return f"{rows:,.0f} {where}" if rows is not None else f"the {where}"


def _values_text(values: Sequence[float | None]) -> str:
    """Shares in percent; of many peers their mean and range."""
    texts = [f"{100 * v:.2f}" for v in values if v is not None and math.isfinite(v)]
    there = [v for v in values if v is not None]
    if not there:
        return "no score that is a number"
    if len(texts) <= NAMED_PEERS:
        *first, last = texts
        return f"{', '.join(first)} and {last} %" if first else f"{last} %"
    mean = sum(there) / len(there)
    return f"a mean of {100 * mean:.2f} % ({100 * min(there):.2f} to {100 * max(there):.2f})"


def _points(value: float, unit: str = " points") -> str:
    """A difference of shares, signed."""
    return f"{100 * value:+.2f}{unit}".replace("-", "−")
