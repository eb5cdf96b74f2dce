"""The record of a reproduction as a Markdown table and as CSV: functions of the record alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from fastdml.reproduce.outcome import outcome
from fastdml.reproduce.record import FULL, Record, RowRecord, Side
from fastdml.reproduce.statistics import present, spread
from fastdml.reproduce.texts import (
    difference_of,
    escaped,
    interval,
    of_seeds,
    p_text,
    plain,
    signed,
)
from fastdml.units import duration

NONE = "-"
COLUMNS = (
    "experiment", "scale", "scaled_down", "row", "unit", "seed", "baseline_name", "ours_name",
    "paper_baseline", "paper_ours", "baseline", "baseline_sd", "ours", "ours_sd", "difference",
    "low", "high", "p", "pairs",
)  # fmt: skip


def markdown(record: Record) -> str:
    """table.md: what was scaled down, the table, its seeds, and what made it."""
    parts = [
        scaled_down(record),
        f"# {escaped(record.title)}\n\nIn the paper: {escaped(record.place)}.",
        table(record),
        " ".join(outcome(record)),
        " ".join(legend(record)),
        *map(escaped, record.notes),
        made_by(record),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def scaled_down(record: Record) -> str:
    """The first line of every output of a scale but the full one."""
    if record.scale == FULL:
        return ""
    changes = "; ".join(record.changes)
    return f"Scaled down: {escaped(f'{record.scale}: {changes}' if changes else record.scale)}."


def table(record: Record) -> str:
    """The rows: the paper's figures where there are any, ours, and the difference where there are
    two."""
    columns: list[tuple[str, Callable[[RowRecord], str]]] = [("", lambda row: escaped(row.label))]
    sides = _sides(record)
    for title, of in sides:
        if any(side.paper is not None for side in map(of, record.rows) if side):
            columns.append((f"paper, {title}", partial(_paper, of, title)))
    columns += [(title, partial(_measured, of, title)) for title, of in sides]
    if any(row.baseline for row in record.rows):
        columns += [("difference (95 % interval)", difference_text), ("p", _p_of)]
    head = [title for title, _ in columns]
    return columns_of([head, *([cell(row) for _, cell in columns] for row in record.rows)])


SideOf = Callable[[RowRecord], Side | None]


def _sides(record: Record) -> list[tuple[str, SideOf]]:
    """Title of its column, and the side: by the name that all rows give it, or else by what it
    is."""
    sides: list[tuple[str, SideOf]] = [
        ("baseline", lambda row: row.baseline),
        ("ours", lambda row: row.ours),
    ]
    found = []
    for title, of in sides:
        names = {side.name for side in map(of, record.rows) if side}
        if names:
            found.append((escaped(names.pop()) if len(names) == 1 else title, of))
    return found


def _named(text: str, side: Side, title: str) -> str:
    """A cell that names its side where the column's title does not."""
    return text if title == escaped(side.name) else f"{text} ({escaped(side.name)})"


def _paper(of: SideOf, title: str, row: RowRecord) -> str:
    side = of(row)
    if side is None or side.paper is None:
        return NONE
    return _named(plain(side.paper, row.unit), side, title)


def _measured(of: SideOf, title: str, row: RowRecord) -> str:
    side = of(row)
    if side is None:
        return NONE
    n, mean, sd = spread(side.values)
    if mean is None:
        return _named("failed", side, title)
    text = (
        plain(mean, row.unit) if sd is None else f"{plain(mean, row.unit)} ± {plain(sd, row.unit)}"
    )
    text = _with_unit(text, row.unit)
    if n < len(side.values):
        text += f", {n} of {len(side.values)} seeds"
    return _named(text, side, title)


def difference_text(row: RowRecord) -> str:
    """The mean difference, with its interval or the reason why there is none."""
    found = difference_of(row)
    if found is None or found.mean is None:
        return NONE
    text = signed(found.mean, row.unit)
    if found.same:
        return f"{text} in every seed{of_seeds(row, found)}"
    between = interval(found, row.unit)
    if between is None:
        return f"{text} (one seed: no interval)"
    return f"{text} ({between}){of_seeds(row, found)}"


def _p_of(row: RowRecord) -> str:
    found = difference_of(row)
    if found is None or found.p is None:
        return NONE
    return p_text(found.p)


def _with_unit(text: str, unit: str) -> str:
    return text if unit in ("", "%") else f"{text} {escaped(unit)}"


def legend(record: Record) -> list[str]:
    """What the columns are: seeds, and what stands behind the plus-minus and the interval."""
    units = list(dict.fromkeys(row.unit for row in record.rows if row.unit))
    seeds = ", ".join(map(str, record.seeds))
    count = len(record.seeds)
    found = [f"Seed{'s' * (count > 1)} {seeds}."]
    if "%" in units:
        found.append("Numbers without a unit are in %, their differences in points.")
    if count > 1:
        found.append("Mean ± standard deviation over seeds.")
    if any(row.baseline for row in record.rows):
        found.append(
            "Difference: on the same seeds, with its interval and p of the paired t-test."
            if count > 1
            else "With one seed a difference has neither interval nor test."
        )
    judged = [one for row in record.rows if (one := difference_of(row)) and one.low is not None]
    if len(judged) > 1:
        found.append(
            f"Each of the {len(judged)} intervals is judged by itself: where nothing differs, one "
            "in twenty leaves 0 out."
        )
    return found + missing(record)


def missing(record: Record) -> list[str]:
    """A sentence for each value that is not there, but for those of a side that has none: of all of
    these the table says that they failed."""
    sides = [side for row in record.rows for side in (row.baseline, row.ours) if side is not None]
    found = ["Failed: no seed has a value."] if any(not present(s.values) for s in sides) else []
    return found + [
        f"No value of {escaped(side.name)}, {escaped(row.label)}, seed {seed}: "
        "it is in no mean, nor is its pair."
        for row in record.rows
        for side in (row.baseline, row.ours)
        if side is not None and present(side.values)
        for seed, value in zip(record.seeds, side.values, strict=True)
        if not present([value])
    ]


def made_by(record: Record) -> str:
    """Commands; of the last, versions, commit, device and date; and the cost of all."""
    found = record.provenance
    if not found:
        return ""
    commands = "\n".join([*found.get("earlier", ()), found["command"]])
    lines = [f"```sh\n{commands}\n```"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    code = f"commit {found['commit']}" if found["commit"] else "installed, no checkout"
    facts = [versions, code, found["device"], found["date"]]
    lines.append(escaped("; ".join(facts)) + ".")
    if record.trainings:
        lines.append(escaped(cost(record)))
    return "\n\n".join(lines)


def cost(record: Record) -> str:
    """How many trainings, how long all of them took, where and by which code."""
    count = len(record.trainings)
    devices = _listed(training.device for training in record.trainings)
    commits = _listed(commit for training in record.trainings for commit in training.commits)
    code = f", by commit {commits}" if commits else ""
    return (
        f"{count} training{'s' * (count > 1)}, {duration(record.seconds)} in all, on "
        f"{devices}{code}."
    )


def _listed(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def columns_of(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown whose columns line up as text, too."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    head, *rest = rows
    rule = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in (head, rule, *rest)
    )


def comma_separated(record: Record) -> str:
    """table.csv: of each row a line with means ("seed" is "all"), then a line a seed. Empty cells
    where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in record.rows:
        writer.writerows([_line_of_row(record, row), *_lines_of_seeds(record, row)])
    return text.getvalue()


def _names_in(record: Record, row: RowRecord) -> dict[str, str]:
    names = {"ours_name": row.ours.name}
    if row.baseline:
        names["baseline_name"] = row.baseline.name
    keys = {"experiment": record.experiment, "scale": record.scale}
    keys["scaled_down"] = "; ".join(record.changes)  # what was changed; empty at the full scale
    return {**keys, "row": row.label, "unit": row.unit, **names}


def _line_of_row(record: Record, row: RowRecord) -> dict[str, str | float | None]:
    line: dict[str, str | float | None] = {**_names_in(record, row), "seed": "all"}
    for key, side in (("baseline", row.baseline), ("ours", row.ours)):
        if side is not None:
            _, line[key], line[f"{key}_sd"] = spread(side.values)
            line[f"paper_{key}"] = side.paper
    if found := difference_of(row):
        line |= {"difference": found.mean, "low": found.low, "high": found.high}
        line |= {"p": found.p, "pairs": found.n}
    return line


def _lines_of_seeds(record: Record, row: RowRecord) -> Iterable[dict[str, str | float | None]]:
    for number, seed in enumerate(record.seeds):
        line: dict[str, str | float | None] = {**_names_in(record, row), "seed": seed}
        ours = present(row.ours.values[number : number + 1])
        line["ours"] = ours[0] if ours else None
        if row.baseline:
            baseline = present(row.baseline.values[number : number + 1])
            line["baseline"] = baseline[0] if baseline else None
            line["difference"] = ours[0] - baseline[0] if ours and baseline else None
        yield line
