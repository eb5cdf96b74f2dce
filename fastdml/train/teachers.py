"""The teachers of a run: found by the names that its settings give them, and found to be the same
when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastdml.cohort import Cohort
from fastdml.cohort_teachers import TIMM, Identity, Teacher, listed_teachers
from fastdml.errors import InputError
from fastdml.paths import expanded
from fastdml.peer_outputs import full_precision, peer_numbers
from fastdml.train.config.base import TrainConfig
from fastdml.train.run_weights import best_peer, load_cohort

logger = logging.getLogger(__name__)


@contextmanager
def taught(
    cohort: Cohort, config: TrainConfig, more: Sequence[str | nn.Module] = ()
) -> Iterator[None]:
    """Within it `cohort` has behind its own teachers those that the settings name, and `more`;
    afterwards its own, and it knows by which its weights were taught. Raises InputError."""
    before = cohort.teachers
    if wanted := [*config.teachers, *listed_teachers(more)]:
        try:
            cohort.teachers = [*before, *found(wanted)]
        except InputError as error:
            if not config.resume:
                raise
            run = f"cannot resume {config.folder or 'the run'}"
            raise InputError(f"{run}: {error}; --teachers says where they are now") from None
    try:
        yield
    finally:
        identities = cohort.taught_by
        cohort.teachers = before
        cohort.taught_by = identities


@contextmanager
def untaught(cohort: Cohort) -> Iterator[None]:
    """Within it `cohort` has no teachers."""
    before, cohort.teachers = cohort.teachers, ()
    try:
        yield
    finally:
        cohort.teachers = before


def found(names: Sequence[str | nn.Module]) -> list[str | nn.Module]:
    """What `Cohort` takes as teachers, of these names: timm:NAME, or RUN[:PEER], a peer of what
    `fastdml.load` reads, by its name, its number or "best"; without :PEER each of its peers. Raises
    InputError, which begins with the name. Modules are passed on."""
    teachers: list[str | nn.Module] = []
    for name in names:
        if not isinstance(name, str) or name.startswith(TIMM):
            teachers.append(name)
            continue
        try:
            teachers += _of_a_run(name)
        except InputError as error:
            raise InputError(f"teacher {name}: {error}") from None
    sources = [one.source if isinstance(one, Teacher) else one for one in teachers]
    for place, source in enumerate(sources):
        if isinstance(source, str) and source in sources[:place]:
            raise InputError(
                f"teacher {source} is named twice: name it once; how much it counts, a callback's "
                "set_peer_weights says"
            )
    return teachers


def _of_a_run(name: str) -> list[Teacher]:
    path, peer = _split(name)
    cohort, weights = load_cohort(path, None, "cpu")
    if peer == "ensemble":
        raise InputError(
            "an ensemble gives no logits: leave the peer out, so that each of them teaches, and "
            "set target to ensemble"
        )
    if peer == "best":
        chosen = [best_peer(path, weights, cohort.names)]
    else:
        chosen = peer_numbers(cohort.names, "ensemble" if peer is None else peer)
    place = name if peer is None else name.removesuffix(f":{peer}")
    shown, record = path.name or path.resolve().name, cohort.record()  # "." has no name
    return [
        Teacher(
            full_precision(cohort.peers[k]),
            name=f"{shown}:{cohort.names[k]}",
            source=f"{place}:{cohort.names[k]}",
            model=cohort.models[k],
            record=record,
        )
        for k in chosen
    ]


def _split(name: str) -> tuple[Path, str | None]:
    """The path and the peer of RUN[:PEER]. Either may hold colons: the longest path that exists is
    meant."""
    if expanded(name).exists():
        return expanded(name), None
    ends = [at for at, letter in enumerate(name) if letter == ":"]
    for at in reversed(ends):
        if (path := expanded(name[:at])).exists():
            return path, name[at + 1 :]
    return expanded(name.partition(":")[0]), None


def check_same_teachers(
    saved: Sequence[Mapping[str, Any]], now: Sequence[Identity], what: str
) -> None:
    """Raises InputError, which `what` begins, where a run's teachers are not those it had. Where
    they are from does not matter, their weights do."""
    was = [Identity(**entry) for entry in saved]
    if len(was) != len(now):
        before, after = (", ".join(t.name for t in each) or "none" for each in (was, now))
        raise InputError(f"{what}: its teachers were {before} and are now {after}")
    for one, other in zip(was, now, strict=True):
        if one.sha256 != other.sha256:
            raise InputError(
                f"{what}: teacher {one.source or one.name} had weights of SHA-256 "
                f"{one.sha256[:12]}, and those of {other.source or other.name} are "
                f"{other.sha256[:12]}: restore them, or start a new run in another folder"
            )
