"""What a record says, in sentences that its intervals choose: no word of them is written before the
trainings have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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
Verdict = Literal["gain", "loss", "difference", "open", "same", "constant", "one seed", "none"]


def outcome(record: Record) -> list[str]:
    """A sentence for each kind of outcome that rows have: a gain or a loss where the interval
    leaves 0 out, no difference that so many seeds can show where it does not."""
    judged = [(row, found) for row in record.rows if (found := difference_of(row))]
    kinds: list[tuple[Verdict, str, bool]] = [
        ("gain", "A gain", True),
        ("loss", "A loss", True),
        ("difference", "A difference", True),
        ("open", f"No difference that {_seeds(record)} can show", True),
        ("same", "The same in every seed", False),
        ("constant", "One difference in every seed", True),
        ("one seed", "Of one seed, which says nothing of others", True),
        ("none", "No figure", False),
    ]
    texts = [
        f"{title}: {'; '.join(_row(record, j, with_numbers) for j in chosen)}."
        for kind, title, with_numbers in kinds
        if (chosen := [j for j in judged if verdict(*j) == kind])
    ]
    return [f"{compared(record)}.", *texts, *single_seeds(record)] if texts else []


def verdict(row: RowRecord, found: Difference) -> Verdict:
    """What the interval of a row's difference says of it: "open" is no difference that so many
    seeds can show, "difference" one of a number that has no better direction."""
    if found.clear and found.mean is not None:
        if not row.better:
            return "difference"
        return "gain" if (found.mean > 0) == (row.better == "higher") else "loss"
    if found.low is not None:
        return "open"
    if found.same and found.mean is not None:
        nothing = signed(found.mean, row.unit) == signed(0.0, row.unit)
        return "same" if nothing else "constant"
    return "one seed" if found.n == 1 else "none"


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
