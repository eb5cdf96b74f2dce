"""analysis.json: what was found out about the peers of a run after it ended, as plain values.

An object a result, by its name: `{"version": 1, "flat_minima": {...}, ...}`. `fastdml.analysis`
makes them; the page of a run shows those that it knows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdml.errors import InputError
from fastdml.files import write_atomically
from fastdml.paths import expanded
from fastdml.report.metrics_log import to_json

ANALYSIS = "analysis.json"
VERSION = 1
LARGEST = 1 << 26  # bytes


class Result:
    """The base of results, which are frozen dataclasses of numbers, texts and arrays."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, texts, lists and dicts, which is what JSON knows."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def write_analysis(folder: str | Path, found: Mapping[str, Any]) -> Path:
    """Writes the results, each a dict of plain values, in one step; null stands for NaN. Raises
    InputError where it cannot."""
    path = Path(folder) / ANALYSIS
    write_atomically(path, f"{to_json({'version': VERSION, **found})}\n")
    return path


def read_analysis(folder: str | Path) -> dict[str, Any]:
    """The results of a run by their name, of any form; empty where it has none. Raises InputError
    for a file that is damaged or of a later version."""
    path = expanded(folder) / ANALYSIS
    none = InputError(f"{path} holds no analysis of a run: delete it, and analyse the run again")
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise none
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON: delete it, and analyse the run again") from None
    version = found.pop("version", None) if isinstance(found, dict) else None
    if type(version) is not int:
        raise none
    if version > VERSION:
        raise InputError(f"{path} is of a later version of fastdml ({version}): update fastdml")
    return found
