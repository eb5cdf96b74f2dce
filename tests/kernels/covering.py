"""Covering arrays: few combinations of settings in which every pair, or every triple, occurs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Space = Mapping[str, Sequence[Any]]  # the values of each setting
Chosen = frozenset[tuple[str, int]]  # settings with the places of their values
Never = Sequence[tuple[tuple[str, Any], tuple[str, Any]]]  # pairs of values that exclude each other


class Covering:
    """A covering array of `space`: lists of settings in which occur together any values of any
    `strength` of the settings, and any of any `core_strength` of those named in `core`, but for
    combinations that hold a pair of `never`.

    A setting may exclude values of another only where it has a value itself that excludes none.
    """

    CANDIDATES = 5  # of which the one that covers most is taken

    def __init__(
        self, space: Space, strength: int = 2, *, core: Sequence[str] = (), core_strength: int = 3,
        never: Never = (), seed: int = 0,
    ) -> None:  # fmt: skip
        self.space, self.strength = space, strength
        self.core, self.core_strength = core, core_strength
        self.excluded = {
            frozenset((name, space[name].index(value)) for name, value in pair)
            for pair in never
            if all(value in space[name] for name, value in pair)
        }
        self.draw = random.Random(seed)

    def tuples(self) -> set[Chosen]:
        """All combinations of values that must occur."""
        settings = {*combinations(self.space, self.strength)}
        settings |= {*combinations(self.core, self.core_strength)}
        found: set[Chosen] = set()
        for names in settings:
            places = ([(name, i) for i in range(len(self.space[name]))] for name in names)
            found |= {frozenset(each) for each in product(*places)}
        return {each for each in found if self._can_be(each)}

    def rows(self) -> list[dict[str, Any]]:
        """Greedily: each row is begun with a combination that has not occurred yet."""
        left, rows = self.tuples(), []
        ordered = sorted(left, key=sorted)
        for first in ordered:
            if first not in left:
                continue
            candidates = [self._complete(first, left) for _ in range(self.CANDIDATES)]
            gains = [len(left.intersection(self.occurring(each))) for each in candidates]
            best = candidates[gains.index(max(gains))]
            left.difference_update(self.occurring(best))
            rows.append({name: self.space[name][i] for name, i in best.items()})
        return rows

    def occurring(self, row: Mapping[str, int]) -> Iterator[Chosen]:
        """The combinations of a row, given as places of values, that count."""
        for names in combinations(self.space, self.strength):
            yield frozenset((name, row[name]) for name in names)
        for names in combinations(self.core, self.core_strength):
            yield frozenset((name, row[name]) for name in names)

    def random_row(self) -> dict[str, Any]:
        """Every setting drawn by itself, as far as the values go together."""
        names = self.draw.sample(list(self.space), len(self.space))
        row: dict[str, int] = {}
        for name in names:
            row[name] = self.draw.choice(self._fitting(row, name))
        return {name: self.space[name][row[name]] for name in self.space}

    def _complete(self, first: Chosen, left: set[Chosen]) -> dict[str, int]:
        row = dict(first)
        for name in self.draw.sample(list(self.space), len(self.space)):
            if name not in row:
                fitting = self._fitting(row, name)
                gains = [self._gain(row, (name, i), left) for i in fitting]
                best = [i for i, gain in zip(fitting, gains, strict=True) if gain == max(gains)]
                row[name] = self.draw.choice(best)
        return row

    def _gain(self, row: Mapping[str, int], new: tuple[str, int], left: set[Chosen]) -> int:
        """How many combinations of `left` a setting adds to a row."""
        known = list(row.items())
        gain = sum(
            frozenset((*others, new)) in left for others in combinations(known, self.strength - 1)
        )
        if new[0] in self.core:
            known = [each for each in known if each[0] in self.core]
            others = combinations(known, self.core_strength - 1)
            gain += sum(frozenset((*each, new)) in left for each in others)
        return gain

    def _fitting(self, row: Mapping[str, int], name: str) -> list[int]:
        places = range(len(self.space[name]))
        return [i for i in places if self._can_be(frozenset({*row.items(), (name, i)}))]

    def _can_be(self, chosen: Iterable[tuple[str, int]]) -> bool:
        return not any(frozenset(pair) in self.excluded for pair in combinations(chosen, 2))
