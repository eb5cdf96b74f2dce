"""Which row of a mesh trains which peer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdml.errors import InputError


def place(K: int, rows: int, costs: Sequence[float] | None = None) -> tuple[int, ...]:
    """The row of each of K peers.

    costs: of each peer's step, in any unit. Without them, or where all are equal, rows get blocks
    of neighbours. Else peers go, the dearest first, to the row with the least to do, which is at
    most a third above the best there is (Graham 1969).

    Raises InputError for more rows than peers, and for costs that are not K positive numbers.
    """
    if rows > K:
        raise InputError(
            f"a mesh with peer={rows} needs at least {rows} peers, and the cohort has {K}: take "
            f"peer={K} or fewer, and a larger data="
        )
    if costs is None or len(set(costs)) == 1:
        costs = [1.0] * K if costs is None else costs
        found = tuple(k * rows // K for k in range(K))
    else:
        found = _balanced(costs, rows)
    if len(costs) != K or not all(c > 0 and math.isfinite(c) for c in costs):
        raise InputError(f"costs must be {K} positive numbers, one a peer, not {list(costs)}")
    return found


def _balanced(costs: Sequence[float], rows: int) -> tuple[int, ...]:
    load = [0.0] * rows
    found = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        found[k] = load.index(min(load))
        load[found[k]] += costs[k]
    return tuple(found)


def auto_sizes(world: int, costs: Sequence[float]) -> tuple[int, int]:
    """The numbers of rows and columns of `world` ranks with which a step should take the least
    time: that of the row with the most to do, divided by the columns.

    costs: of each of K peers on a whole batch, in any unit. Of sizes within a tenth of the best the
    most rows are taken, since logits are fewer bytes than gradients. Raises InputError as `place`.
    """
    times: dict[int, float] = {}
    for rows in range(1, min(world, len(costs)) + 1):
        if world % rows == 0:
            load = [0.0] * rows
            for k, row in enumerate(place(len(costs), rows, costs)):
                load[row] += costs[k]
            times[rows] = max(load) / (world // rows)
    best = min(times.values())
    rows = max(rows for rows, time in times.items() if time <= 1.1 * best)
    return rows, world // rows


def refitted(peer: int, data: int, world: int, K: int, parts: int = 0) -> tuple[int, int]:
    """The rows and columns of a job of peer * data ranks that goes on with `world`: the same number
    of rows where that is possible, so that a rank has no more peers than before, else the nearest.

    parts: that a batch is computed in, a column or more of them each; 0: any number of columns will
    do. Raises InputError where K peers and these parts do not fit so many ranks.
    """
    fitting = [
        rows
        for rows in range(1, min(world, K) + 1)
        if world % rows == 0 and (not parts or parts % (world // rows) == 0)
    ]
    if not fitting:
        raise InputError(
            f"{world} ranks are left of a mesh peer={peer},data={data}, and no other mesh has so "
            f"many for {K} peers and {parts} parts of a batch: start with another number of ranks"
        )
    rows = min(fitting, key=lambda rows: (abs(math.log(rows / peer)), -rows))
    return rows, world // rows
