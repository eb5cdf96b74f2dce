"""Values of an analysis, checked: its file is only as good as whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdml.report.run_files import RunFiles, number

Found = Mapping[str, Any]
MOST_PEERS = 32
MOST_POINTS = 2000  # of a line


class Unreadable(Exception):
    """An analysis of another form."""


def several(found: Any) -> list[Found]:
    several = found if isinstance(found, list) else [found]
    if not several or not all(isinstance(of, dict) for of in several):
        raise Unreadable("its kind")
    return several


def needed(of: Any, name: str) -> Any:
    if not isinstance(of, dict) or name not in of:
        raise Unreadable(f"no {name}")
    return of[name]


def texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Unreadable("names")
    return value


def peers(of: Any, run: RunFiles) -> list[str]:
    """Those of the analysis, which are all of the run, in its order."""
    names = texts(needed(of, "peers"))
    if names != run.peers or len(names) > MOST_PEERS:
        raise Unreadable("other peers")
    return names


def peers_and_ensemble(of: Any, run: RunFiles, ensemble: str) -> list[str]:
    """The same with the ensemble, which a lone peer may be without."""
    names = texts(needed(of, "peers"))
    if names == run.peers and len(names) == 1:
        return names
    if names != [*run.peers, ensemble] or len(names) > MOST_PEERS:
        raise Unreadable("other peers")
    return names


def some_peers(of: Any, run: RunFiles) -> list[str]:
    """Those of the analysis, which are some of the run."""
    names = texts(needed(of, "peers"))
    if not names or not set(names) <= set(run.peers):
        raise Unreadable("other peers")
    return names


def vector(value: Any, count: int | None = None) -> list[float | None]:
    if not isinstance(value, list) or len(value) > MOST_POINTS:
        raise Unreadable("its numbers")
    if count is not None and len(value) != count:
        raise Unreadable("its numbers")
    return [number(v) for v in value]


def whole(values: list[float | None]) -> list[float]:
    """Where no value may be missing."""
    there = [float(v) for v in values if v is not None]
    if len(there) < len(values):
        raise Unreadable("its numbers")
    return there


def matrix(value: Any, rows: int, columns: int) -> list[list[float | None]]:
    if not isinstance(value, list) or len(value) != rows:
        raise Unreadable("its numbers")
    return [vector(row, columns) for row in value]
