"""What mutual learning changes in trained peers: how flat their minima are, what lies between them,
how alike their features are, how sure they are, and where they agree.

Each analysis is a function that gives a frozen dataclass of plain values, with `to_dict`, and has a
function of its own that draws it. They take networks of any origin and batches (inputs, labels);
`analyse` reads the folder of a run. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdml.analysis.posteriors import Posterior, posterior
    from fastdml.analysis.run import (
        RunPeers,
        flat_minima_of_run,
        peers_of_run,
        posterior_of_run,
    )
    from fastdml.analysis.weight_noise import FlatMinima, flat_minima

_HOMES = {
    "FlatMinima": "weight_noise",
    "Posterior": "posteriors",
    "RunPeers": "run",
    "flat_minima": "weight_noise",
    "flat_minima_of_run": "run",
    "peers_of_run": "run",
    "posterior": "posteriors",
    "posterior_of_run": "run",
}

__all__ = [
    "FlatMinima",
    "Posterior",
    "RunPeers",
    "flat_minima",
    "flat_minima_of_run",
    "peers_of_run",
    "posterior",
    "posterior_of_run",
]


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"fastdml.analysis.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'fastdml.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
