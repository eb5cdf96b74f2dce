"""What an experiment is: trainings, and rows that compare numbers of them with the paper's.

All of it is data, made anew for each scale. A `Training` is one run folder a seed; experiments that
need the same training give it the same name and settings, and share its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fastdml.errors import InputError
from fastdml.names import advice

if TYPE_CHECKING:
    from fastdml.reproduce.scales import Scale
    from fastdml.reproduce.trainings import Finished

Phase = Literal["mutual", "independent"]


@dataclass(frozen=True)
class Training:
    """Peers trained together, and with the setting `independent` also each by itself."""

    name: str  # safe as a folder's name, such as cifar100-resnet32-x2
    settings: Mapping[str, Any]  # of TrainConfig: all but seed, folder, root, device and teachers
    teachers: tuple[PeerOf, ...] = ()  # frozen, of the same seed


@dataclass(frozen=True)
class PeerOf:
    """A trained peer of another training."""

    training: Training
    phase: Phase
    peer: int  # from 0


@dataclass(frozen=True)
class Number:
    """How a number is read off a finished training: percent, nats or the like."""

    read: Callable[[Finished, Phase], float]
    unit: str = "%"
    better: Literal["higher", "lower", ""] = "higher"


@dataclass(frozen=True)
class Value:
    """A number of one phase of a training, one a seed; paper: what the paper has for it."""

    name: str  # of what was done, such as "independent"
    training: Training
    phase: Phase
    number: Number
    paper: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table: `ours` against `baseline`, on the same seeds. choice: what comes after the
    experiment's name to ask for this row, and others with the same choice, alone. series, x: of
    rows that are points of a curve, and what is varied on it."""

    choice: str
    label: str
    baseline: Value
    ours: Value
    series: str = ""
    x: float | None = None
    x_name: str = "peers"


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, as rows that each scale has anew."""

    name: str
    title: str
    place: str  # of the paper, such as "Table 2"
    rows: Callable[[Scale], Sequence[Row]]  # raises InputError for a scale that it cannot have
    notes: Callable[[Scale], Sequence[str]] = field(default=lambda scale: ())
    changes: Callable[[Scale], Sequence[str]] = field(default=lambda scale: scale.changes)
    """What the scale changes in the paper's settings, phrases; none at the full scale alone."""

    def choices(self, scale: Scale) -> list[str]:
        """What rows can be asked for by."""
        return list(dict.fromkeys(row.choice for row in self.rows(scale)))

    def chosen(self, scale: Scale, choices: Sequence[str]) -> list[Row]:
        """The rows of these choices, all where there are none. Raises InputError for one that is
        not there, with the nearest."""
        rows, known = self.rows(scale), self.choices(scale)
        for choice in choices:
            if choice not in known:
                raise InputError(
                    f"{self.name} has no row {choice!r} at scale {scale.name}; "
                    f"{advice(choice, known)}"
                )
        return [row for row in rows if not choices or row.choice in choices]


def trainings_of(rows: Sequence[Row]) -> list[Training]:
    """The trainings that rows need, each once, teachers before those that they teach. Raises
    ValueError where two of one name differ."""
    found: dict[str, Training] = {}
    for row in rows:
        for value in (row.baseline, row.ours):
            for training in _with_teachers(value.training):
                if found.setdefault(training.name, training) != training:
                    raise ValueError(f"two trainings are called {training.name}")
    return list(found.values())


def _with_teachers(training: Training) -> Iterator[Training]:
    for teacher in training.teachers:
        yield from _with_teachers(teacher.training)
    yield training
