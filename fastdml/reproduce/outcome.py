"""What a record says, in sentences that its intervals choose: no word of them is written before the
trainings have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdml.reproduce.record import Record, RowRecord
from fastdml.reproduce.statistics import Difference, pairs
from fastdml.reproduce.texts import (
    difference_of,
    escaped,
    interval,
    label_of,
    of_seeds,
    sides,
    signed,
)

Judged = tuple[RowRecord, Difference]


def outcome(record: Record) -> list[str]:
    """A sentence for each kind of outcome that rows have: a gain or a loss where the interval
    leaves 0 out, no difference that so many seeds can show where it does not."""
    judged = [(row, found) for row in record.rows if (found := difference_of(row))]
    kinds: list[tuple[str, Callable[[Judged], bool], bool]] = [
        ("A gain", lambda j: j[1].clear and _better(j) > 0, True),
        ("A loss", lambda j: j[1].clear and _better(j) < 0, True),
        ("A difference", lambda j: j[1].clear and not j[0].better, True),
        (f"No difference that {_seeds(record)} can show", _open, True),
        ("The same in every seed", lambda j: j[1].same and _nothing(j), False),
        ("One difference in every seed", lambda j: j[1].same and not _nothing(j), True),
        ("Of one seed, which says nothing of others", lambda j: j[1].n == 1, True),
        ("No figure", lambda j: j[1].n == 0, False),
    ]
    texts = [
        f"{title}: {'; '.join(_row(record, j, with_numbers) for j in chosen)}."
        for title, fits, with_numbers in kinds
        if (chosen := [j for j in judged if fits(j)])
    ]
    return [f"{compared(record)}.", *texts, *single_seeds(record)] if texts else []


def compared(record: Record) -> str:
    """What is held against what, where it is the same in all rows, and over how many seeds:
    "Mutual against independent, 3 seeds"."""
    names = sides(record)
    if len(names) != 1:
        return _seeds(record)
    text = " against ".join(*names)
    return escaped(f"{text[:1].upper()}{text[1:]}, {_seeds(record)}")


def single_seeds(record: Record) -> list[str]:
    """How far a row's differences of single seeds are apart, at most, and how often one has another
    sign than the row's mean: what somebody who trained one seed could have reported."""
    if len(record.seeds) < 2:
        return []
    units: dict[str, list[list[float]]] = {}
    for row in record.rows:
        gaps = pairs(row.baseline.values, row.ours.values) if row.baseline else []
        if len(gaps) > 1 and not all(
            signed(gap, row.unit) == signed(0.0, row.unit) for gap in gaps
        ):
            units.setdefault(row.unit, []).append(gaps)
    found = []
    for unit, rows in units.items():
        widest = max(rows, key=lambda gaps: max(gaps) - min(gaps))
        low, high = (signed(bound(widest), unit) for bound in (min, max))
        against = sum(gap * sum(gaps) < 0 for gaps in rows for gap in gaps)
        count = sum(map(len, rows))
        found.append(
            f"Single seeds: within one row from {low} to {_with(high, unit)}; {against} of {count} "
            "differences have another sign than the mean of their row."
        )
    return found


def _better(judged: Judged) -> float:
    """Above 0 for a gain, below for a loss, 0 where neither direction is better."""
    row, found = judged
    mean = found.mean or 0.0
    return {"higher": mean, "lower": -mean}.get(row.better, 0.0)


def _open(judged: Judged) -> bool:
    """Whether there is an interval, with 0 in it."""
    return judged[1].low is not None and not judged[1].clear


def _nothing(judged: Judged) -> bool:
    row, found = judged
    return found.mean is not None and signed(found.mean, row.unit) == signed(0.0, row.unit)


def _row(record: Record, judged: Judged, with_numbers: bool) -> str:
    row, found = judged
    label = escaped(label_of(record, row))
    if not with_numbers or found.mean is None:
        return label
    text = _with(signed(found.mean, row.unit), row.unit)
    between = interval(found, row.unit)
    between = "" if between is None else f", {between}"
    return f"{label} ({text}{between}{of_seeds(row, found)})"


def _with(text: str, unit: str) -> str:
    return f"{text} {'points' if unit == '%' else unit}".rstrip()


def _seeds(record: Record) -> str:
    return count_of_seeds(record.seeds)


def count_of_seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
