"""Numbers and words of a record as texts, as tables and sentences have them."""

from __future__ import annotations

import re

from fastdml.reproduce.record import Record, RowRecord
from fastdml.reproduce.statistics import Difference, difference

DIGITS = {"%": 2}  # after the point, of a unit; of others:
MORE_DIGITS = 4
SPECIAL = re.compile(r"([\\`*_\[\]<>|~#])")


def difference_of(row: RowRecord) -> Difference | None:
    """ours - baseline; None where there is no baseline."""
    return None if row.baseline is None else difference(row.baseline.values, row.ours.values)


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "below 0.001"


def plain(value: float, unit: str) -> str:
    """A value with as many digits as its unit has, without the unit."""
    return f"{value:.{DIGITS.get(unit, MORE_DIGITS)}f}"


def signed(value: float, unit: str) -> str:
    """A difference with its sign; one that rounds to nothing has none."""
    digits = DIGITS.get(unit, MORE_DIGITS)
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def interval(found: Difference, unit: str) -> str | None:
    """Its bounds, each with its sign also where it rounds to nothing: on which side of 0 it is, is
    what a row is judged by. None where there is no interval."""
    if found.low is None or found.high is None:
        return None
    digits = DIGITS.get(unit, MORE_DIGITS)
    return f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"


def of_seeds(row: RowRecord, found: Difference) -> str:
    """How many of the seeds a difference is of, where it is not of all."""
    count = len(row.ours.values)
    return f", {found.n} of {count} seeds" if found.n < count else ""


def escaped(text: str) -> str:
    """Text as Markdown shows it unchanged, in a cell of a table too."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def sides(record: Record) -> set[tuple[str, str]]:
    """(ours, baseline): what rows hold against what."""
    return {(row.ours.name, row.baseline.name) for row in record.rows if row.baseline}


def label_of(record: Record, row: RowRecord) -> str:
    """A row's label, with what is held against what where that is not the same in all rows."""
    if row.baseline is None or len(sides(record)) == 1:
        return row.label
    return f"{row.label} ({row.ours.name} against {row.baseline.name})"
