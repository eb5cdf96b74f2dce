"""summary.json: settings, hardware and scores of a run, and of its independent run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fastdml import __version__
from fastdml.errors import InputError
from fastdml.files import write_atomically
from fastdml.report.metrics_log import to_json
from fastdml.report.scoring import Scoring

SUMMARY = "summary.json"
LARGEST = 1 << 26  # bytes of a summary
VERSIONED = ("torch", "triton", "numpy")


def write_summary(
    folder: str | Path,
    *,
    config: dict[str, Any],
    scoring: Scoring,
    peers: Sequence[str],
    parameters: Sequence[int],
    device: str,
    execution: str | None,
    threads: int | None,
    command: str,
    chosen_on: str | None = "test",
    scored_on: str | None = "test",
    mutual: dict[str, Any],
    independent: dict[str, Any] | None = None,
    teachers: Sequence[Mapping[str, str | None]] = (),
) -> dict[str, Any]:
    """Writes summary.json and returns what it holds; its date is that of the end, in UTC.

    `mutual` and `independent` are each {"scores": those of `scoring` as a dict, or None where
    nothing was evaluated, "images_per_second": float, "wall_seconds": float}
    and whatever else is worth keeping. chosen_on: the images that chose the best weights; where
    they are validation images, "best_scores" are what the peers' entries show. scored_on: the
    images that these scores are of. teachers: name, source, model and digest of each.
    """
    runs = {"mutual": mutual, "independent": independent}
    groups = config.get("groups", 1)
    key = "best_scores" if chosen_on == "validation" else "scores"
    summary = {
        "config": config,
        "versions": versions(),
        "device": device,
        "execution": execution,
        "threads": threads,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "chosen_on": chosen_on,
        "scored_on": scored_on,
        "peers": [
            {
                "name": name,
                **({"group": k * groups // len(peers)} if groups > 1 else {}),
                "parameters": count,
                **{
                    f"{score.entry}_{run}": _score(values, key, score.name, k)
                    for score in scoring.headlines
                    for run, values in runs.items()
                },
            }
            for k, (name, count) in enumerate(zip(peers, parameters, strict=True))
        ],
        **({"teachers": list(teachers)} if teachers else {}),
        **{f"ensemble_{r}": _score(v, key, f"ensemble_{scoring.leading}") for r, v in runs.items()},
        "mutual": mutual,
        "independent": independent,
    }
    text = to_json(summary, indent=2)
    write_atomically(Path(folder) / SUMMARY, f"{text}\n")
    return json.loads(text)


def read_summary(folder: Path) -> dict[str, Any]:
    """What the summary.json of a run holds, empty where there is none. Raises InputError for a file
    that no run wrote."""
    path = folder / SUMMARY
    try:
        if not path.exists():
            return {}
        regular = path.is_file() and path.stat().st_size <= LARGEST
        found = json.loads(path.read_text()) if regular else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON") from None
    if not regular:
        raise InputError(f"{path} is no summary of a run")
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object")
    return found


def prolonged(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    """Whether a run had ended and was then resumed with another length that it has not reached yet:
    its summary is still that of the old length."""
    before = summary.get("config")
    if not isinstance(before, dict):
        return False
    return any(n in before and before[n] != settings.get(n) for n in ("epochs", "iterations"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"fastdml": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _score(
    run: dict[str, Any] | None, key: str, name: str, peer: int | None = None
) -> float | None:
    if run is None or run[key] is None:
        return None
    return run[key][name] if peer is None else run[key][name][peer]
