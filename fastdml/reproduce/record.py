"""reproduction.json: all that a reproduction of one experiment found, in plain JSON.

Tables, CSV, pictures and pages are made from it alone. A value that is not there, of a training
that failed or that has no such number, is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastdml.errors import InputError
from fastdml.files import write_atomically
from fastdml.report.metrics_log import INDEPENDENT, to_json

RECORD = "reproduction.json"
VERSION = 1
LARGEST = 1 << 24  # bytes
FULL = "full"  # the scale that changes nothing


@dataclass(frozen=True)
class Side:
    """One of the two trainings that a row compares, as the paper has it and as it came out."""

    name: str  # what its column is headed by, such as "independent"
    paper: float | None
    values: tuple[float | None, ...]  # of each seed, in the record's order


@dataclass(frozen=True)
class RowRecord:
    label: str
    baseline: Side | None  # None: a figure without anything to compare it with
    ours: Side
    unit: str = "%"
    better: str = "higher"  # or "lower", or "" where neither is
    series: str = ""  # of a curve: which line the row is a point of
    x: float | None = None  # of a curve: where on it
    x_name: str = "peers"


@dataclass(frozen=True)
class TrainingRecord:
    """What one run folder cost, and where and by what it was trained."""

    name: str
    seed: int
    command: str
    device: str
    threads: int | None
    execution: str | None
    versions: dict[str, str]
    date: str
    seconds: float  # of all its phases
    commits: tuple[str, ...] = ()  # of the code that trained it; empty where nobody noted it


@dataclass(frozen=True)
class Record:
    experiment: str
    title: str
    place: str  # in the paper
    scale: str
    changes: tuple[str, ...]  # what the scale changed: phrases such as "8 epochs in place of 200"
    seeds: tuple[int, ...]
    rows: tuple[RowRecord, ...]
    trainings: tuple[TrainingRecord, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences below the table

    def __post_init__(self) -> None:
        for row in self.rows:
            for side in (row.baseline, row.ours):
                if side is not None and len(side.values) != len(self.seeds):
                    counts = f"{len(side.values)} values of {len(self.seeds)} seeds"
                    raise ValueError(f"{row.label}: {counts}")

    @property
    def seconds(self) -> float:
        """What all its trainings took, one after the other."""
        return math.fsum(training.seconds for training in self.trainings)

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, **dataclasses.asdict(self)}


def write_record(path: Path, record: Record) -> None:
    """Raises InputError where it cannot be written."""
    write_atomically(path, to_json(record.to_dict(), indent=1) + "\n")


def read_record(path: str | Path) -> Record:
    """Raises InputError for a file that is missing, damaged or of a later version."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is no record of a reproduction")
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.pop("version")
        if version > VERSION:
            raise InputError(f"{path} is of a later version of fastdml ({version}): update fastdml")
        return _from_dict(found)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is no record of a reproduction: {reason}; delete it") from None


def _from_dict(found: dict[str, Any]) -> Record:
    rows = [
        _of(RowRecord, {**row, **{name: _side(row[name]) for name in ("baseline", "ours")}})
        for row in found.pop("rows")
    ]
    trainings = [_of(TrainingRecord, training) for training in found.pop("trainings")]
    record = _of(Record, {**found, "rows": rows, "trainings": trainings})
    if len({*record.seeds}) != len(record.seeds):
        raise ValueError(f"seeds {record.seeds}, of which some are the same")
    if record.provenance:
        names = [each.name for each in dataclasses.fields(_Provenance)]
        _of(_Provenance, {k: v for k, v in record.provenance.items() if k in names})
    return record


def _side(found: dict[str, Any] | None) -> Side | None:
    return None if found is None else _of(Side, found)


@dataclass(frozen=True)
class _Provenance:
    """What pages say of a record's provenance; earlier: commands of rows that were there before."""

    command: str
    versions: dict[str, str]
    commit: str | None
    device: str
    date: str
    earlier: tuple[str, ...] = ()


Kind = TypeVar("Kind")


def _of(kind: type[Kind], found: Mapping[str, Any]) -> Kind:
    """A dataclass of plain values, of which lists become tuples. Raises TypeError where a value is
    of another type than its field."""
    made = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    for name, wanted in get_type_hints(kind).items():
        if name in made and not _fits(made[name], wanted):
            raise TypeError(f"{name} of another type")
    return kind(**made)


def _fits(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if inner:  # any of several
        return any(_fits(value, one) for one in inner)
    wanted = (int, float) if kind is float else kind
    return isinstance(value, wanted) and not isinstance(value, bool)


def training_record(
    name: str, seed: int, summary: Mapping[str, Any], commits: tuple[str, ...] = ()
) -> TrainingRecord:
    """Of a finished run, by its summary.json. commits: as `provenance.commits` reads them."""
    from fastdml.reproduce.provenance import public_command

    phases = [summary[phase] for phase in ("mutual", INDEPENDENT) if summary.get(phase)]
    return TrainingRecord(
        name=name,
        seed=seed,
        command=public_command(summary["command"]),
        device=summary["device"],
        threads=summary["threads"],
        execution=summary["execution"],
        versions=dict(summary["versions"]),
        date=summary["date"],
        seconds=math.fsum(phase["wall_seconds"] for phase in phases),
        commits=commits,
    )
