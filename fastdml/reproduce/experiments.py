"""The experiments by name, and what the user's NAME or NAME:ROW means."""

from __future__ import annotations

from collections.abc import Sequence

from fastdml.arguments import shown
from fastdml.errors import InputError
from fastdml.names import advice
from fastdml.reproduce import (
    cifar10,
    cohort_size,
    distillation,
    ensemble_target,
    entropy,
    flat_minima,
    market,
    semi_supervised,
    table2,
)
from fastdml.reproduce.experiment import Experiment

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        table2,
        cifar10,
        distillation,
        cohort_size,
        ensemble_target,
        market,
        semi_supervised,
        flat_minima,
        entropy,
    )
}


def find_experiments(names: Sequence[str]) -> list[tuple[Experiment, tuple[str, ...]]]:
    """The experiments that are named, each once, and the rows that are wanted of each, () for all.
    Raises InputError for a name that there is not, with the nearest."""
    if not names:
        raise InputError("name an experiment, such as 'table2'")
    wanted: dict[str, list[str]] = {}
    for text in names:
        if not isinstance(text, str):
            raise InputError(f"an experiment is a name, such as 'table2', not {shown(text)}")
        name, mark, choice = text.partition(":")
        if name not in EXPERIMENTS:
            raise InputError(f"unknown experiment {name!r}; {advice(name, EXPERIMENTS)}")
        if mark and not choice:
            raise InputError(f"{text} names no row: leave the colon out for all of them")
        wanted.setdefault(name, []).append(choice)
    return [
        (EXPERIMENTS[name], () if "" in choices else tuple(dict.fromkeys(choices)))
        for name, choices in wanted.items()
    ]
