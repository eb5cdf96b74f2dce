"""Equal groups of consecutive peers that do not learn from each other: several seeds in one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdml.errors import InputError
from fastdml.names import unique

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

GROUPS = "groups"  # within a run's folder: a run folder of each group, by its number


def check_groups(groups: int, models: Sequence[str]) -> None:
    """Raises InputError for a number of groups that peers of these models do not make."""
    K = len(models)
    if type(groups) is not int or not 1 <= groups <= max(K, 1):
        raise InputError(
            f"groups must be a whole number from 1 to {max(K, 1)}, the peers, not {groups!r}"
        )
    if K % groups:
        raise InputError(
            f"groups {groups} of {K} peers are not of one size: name the same peers for each group"
        )
    size = K // groups
    for k, model in enumerate(models):
        if model != models[k % size]:
            raise InputError(
                f"groups {groups}: peer {k % size} is {models[k % size]} in group 0 and {model} in "
                f"group {k // size}: name the same peers for each group, one group after the other"
            )


def run_of(folder: Path) -> Path:
    """The run that a folder is of a group of; a run's own folder itself."""
    return folder.parent.parent if folder.parent.name == GROUPS else folder


def group_names(cohort: Cohort, g: int) -> tuple[str, ...]:
    """Names for display of the peers of one group, as if there were no other."""
    size = len(cohort) // cohort.groups
    if cohort.groups == 1:
        return tuple(cohort.names)
    named = zip(cohort.models, cohort.peers, strict=True)
    kinds = [model or type(peer).__name__ for model, peer in named]
    return tuple(unique(kinds[g * size : (g + 1) * size]))


def check_one_ensemble(cohort: Cohort) -> None:
    """Raises InputError where the peers are several groups."""
    if cohort.groups > 1:
        raise InputError(
            f"the peers are {cohort.groups} groups that did not learn from each other, each an "
            f"ensemble of its own: take the folder of one, {GROUPS}/0 to {GROUPS}/"
            f"{cohort.groups - 1} in the run's, or name a peer"
        )
