"""A reproduction of some rows leaves the others that its folder's record has, as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastdml.errors import InputError
from fastdml.reproduce.experiment import Experiment, Row, trainings_of
from fastdml.reproduce.record import RECORD, Record, RowRecord, Side, read_record
from fastdml.reproduce.scales import Scale


def earlier_record(folder: Path, experiment: Experiment, scale: Scale) -> Record | None:
    """That of the results in `folder`; None where there are none. Raises InputError where its rows
    cannot stand beside new ones: it is damaged, or of another experiment or other settings."""
    if not (folder / RECORD).exists():
        return None
    found = read_record(folder / RECORD)
    if (found.experiment, found.scale) != (experiment.name, scale.name):
        raise InputError(
            f"{folder} has results of {found.experiment} at scale {found.scale}, beside which no "
            "others can stand: move it away, or choose another folder with --folder"
        )
    if found.changes != tuple(experiment.changes(scale)):
        raise InputError(
            f"{folder} has rows of other settings ({'; '.join(found.changes)}), which cannot stand "
            "beside new ones: move it away, or choose another folder with --folder"
        )
    return found


def with_earlier_rows(
    record: Record, earlier: Record, experiment: Experiment, scale: Scale
) -> Record:
    """`record`, and each row of an earlier one that it does not have, in its place. A row keeps the
    seeds that it was asked for with: of those of others it has no value."""
    rows = experiment.rows(scale)
    places = {_key(row): place for place, row in enumerate(rows)}
    asked = {_key(row) for row in record.rows}
    kept = {_key(row): row for row in earlier.rows if _key(row) in places.keys() - asked}
    if not kept:
        return record
    seeds = sorted({*record.seeds, *earlier.seeds})
    found = [_of_seeds(row, record.seeds, seeds) for row in record.rows]
    found += [_of_seeds(row, earlier.seeds, seeds) for row in kept.values()]
    names = {one.name for one in trainings_of([row for row in rows if _key(row) in kept])}
    trainings = {(one.name, one.seed): one for one in earlier.trainings if one.name in names}
    trainings |= {(one.name, one.seed): one for one in record.trainings}
    last = record.provenance["command"]
    commands = [*earlier.provenance.get("earlier", ())]
    commands += [earlier.provenance["command"]] if earlier.provenance else []
    return dataclasses.replace(
        record,
        seeds=tuple(seeds),
        rows=tuple(sorted(found, key=lambda row: places[_key(row)])),
        trainings=tuple(trainings.values()),
        notes=tuple(dict.fromkeys((*record.notes, *earlier.notes))),
        provenance={
            **record.provenance,
            "earlier": [one for one in dict.fromkeys(commands) if one != last],
        },
    )


def _key(row: Row | RowRecord) -> tuple[str, ...]:
    """What tells a row from the others of its experiment."""
    return row.label, row.series, row.ours.name, row.baseline.name if row.baseline else ""


def _of_seeds(row: RowRecord, own: Sequence[int], seeds: Sequence[int]) -> RowRecord:
    """A row that has a value of each of its own seeds, with one, or None, of each of `seeds`."""

    def spread(side: Side) -> Side:
        values = dict(zip(own, side.values, strict=True))
        return dataclasses.replace(side, values=tuple(values.get(seed) for seed in seeds))

    baseline = None if row.baseline is None else spread(row.baseline)
    return dataclasses.replace(row, baseline=baseline, ours=spread(row.ours))
