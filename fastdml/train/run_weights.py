"""The weights that a run has saved: which there are, which are meant, and how they scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.exported_weights import read_safetensors
from fastdml.report.metrics_log import read_metrics
from fastdml.report.summary import prolonged, read_summary
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import load_config
from fastdml.train.run_folder import BEST
from fastdml.train.tasks.task import scoring_of
from fastdml.train.unfinished import Unfinished, unfinished
from fastdml.units import percent
from fastdml.yaml_file import CONFIG

logger = logging.getLogger(__name__)

Weights = Literal["last", "best"]


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def run_config(run: Path) -> TrainConfig:
    """The settings of the run in this folder. Raises InputError where there is no run in it."""
    if not is_run(run):
        remedy = (
            f": give the run's folder, {run.parent}"
            if is_run(run.parent)
            else (f": it holds no {CONFIG}")
        )
        raise InputError(f"{run} is not the folder of a run{remedy}")
    return load_config(run / CONFIG)


def default_weights(run: Path) -> Weights:
    """The weights to use where nobody says which: the best where a validation set chose them, else
    the last, since test images that chose the best flatter them."""
    return "best" if chosen_on(run) == "validation" else "last"


def chosen_on(run: Path) -> str | None:
    """The images that chose a run's best weights, "validation" or "test", also of a run that has
    not ended; None where there are no best weights."""
    if not (run / BEST / "cohort.json").is_file():
        return None
    if images := summary(run).get("chosen_on"):
        return images
    return "validation" if _validated(run) else "test"


def find_weights(run: Path, weights: Weights) -> tuple[Unfinished | None, Path]:
    """The folder that a run's weights are in. The last weights of a run that has not ended are in
    its checkpoint: then also what is known of that. Raises InputError where there are none yet."""
    last = weights == "last"
    folder = run if last else run / BEST
    there = (folder / "cohort.json").is_file()
    if there and not (last and prolonged(run_config(run).to_dict(), summary(run))):
        return None, folder
    found = unfinished(run) if last else None
    if found is None and there:
        return None, folder
    if found is None:
        raise InputError(
            f"{run} holds no {weights} weights: they are written when "
            f"{'training ends' if last else 'an epoch is evaluated'}"
        )
    return found, found.path


def run_cohort(
    run: Path,
    weights: Weights,
    device: str | torch.device,
    peers: Sequence[Any] | None = None,
) -> Cohort:
    """The peers of a run in evaluation mode; of a run that has not ended, from its checkpoint,
    which is logged. peers: what to load into, as for `Cohort.load`."""
    found, folder = find_weights(run, weights)
    if found is None:
        return Cohort.load(folder, device, peers=peers)
    cohort = found.cohort(device, peers)
    logger.info(found.describe())
    return cohort


def load_cohort(
    path: Path,
    weights: Weights | None,
    device: str | torch.device,
    peers: Sequence[Any] | None = None,
) -> tuple[Cohort, Weights | None]:
    """The peers below `path`, and which weights of a run they are; None where it is no run."""
    if weights not in (None, "last", "best"):
        raise InputError(f"weights must be 'last' or 'best', not {weights!r}")
    if is_run(path):
        weights = weights or default_weights(path)
        return run_cohort(path, weights, device, peers), weights
    if path.is_file():
        description, tensors = read_safetensors(path)
        cohort = Cohort.restore(description, tensors, path, device, peers=peers)
    elif (path / "cohort.json").is_file():
        cohort = Cohort.load(path, device, peers=peers)
    elif path.exists():
        raise InputError(
            f"{path} is neither the folder of a run, nor of a cohort: it holds no config.yaml and "
            f"no cohort.json{_exported_in(path)}"
        )
    else:
        raise InputError(f"there is no {path}: give the folder of a run or an exported file")
    if weights is not None:
        raise InputError(f"{path} is no run and has one set of weights: leave weights out")
    return cohort, None


def _exported_in(folder: Path) -> str:
    """For the message: what to give in place of a folder of exported files."""
    found = sorted(folder.glob("*.safetensors"))
    return f"; give one of its files, such as {found[0]}" if found else ""


def _choosing_scores(run: Path, weights: Weights) -> dict[str, Any] | None:
    """The scores of these weights to choose a peer by: of the validation images where there are
    some, else of the test images. None where nothing was evaluated."""
    key = "scores" if weights == "last" else "best_scores"
    ended = summary(run).get("mutual")
    state = None if ended else unfinished(run)
    places = [ended and ended.get("validation"), ended, state and state.state]
    for place in places:
        if isinstance(place, dict) and isinstance(place.get(key), dict):
            return place[key]
    return None


def reported_scores(run: Path, weights: Weights) -> tuple[dict[str, Any], str, str] | None:
    """The scores of these weights that a run reports, which images chose its best weights, and
    which the scores are of: "test" or "validation". None where nothing was evaluated."""
    key = "scores" if weights == "last" else "best_scores"
    ended = summary(run)
    scores = (ended.get("mutual") or {}).get(key)
    if isinstance(scores, dict):
        return scores, ended.get("chosen_on") or "test", ended.get("scored_on") or "test"
    state = unfinished(run)
    scores = state.state.get(key) if state else None
    if not isinstance(scores, dict):
        return None
    kind = "validation" if _validated(run) else "test"
    return scores, kind, kind


def best_peer(run: Path, weights: Weights | None, names: Sequence[str]) -> int:
    """The number of the peer with the highest recorded score of these weights, which is logged: of
    validation images where there are some. Raises InputError where no score is recorded."""
    found = _choosing_scores(run, weights) if weights else None
    scoring = scoring_of(found)
    values = found[scoring.leading] if found else []
    if len(values) != len(names):
        raise InputError(
            f"{run} has no recorded scores to tell the best peer by: name one, {' or '.join(names)}"
        )
    k = max(range(len(values)), key=lambda k: values[k] or 0)
    label = scoring.headlines[0].label
    logger.info(f"best peer: {names[k]}, {label} {percent(values[k])} %")
    return k


def summary(run: Path) -> dict[str, Any]:
    """What summary.json holds; nothing where there is none that can be read."""
    try:
        return read_summary(run)
    except InputError:
        return {}


def _validated(run: Path) -> bool:
    """Whether evaluations during training read validation images, by the run's log."""
    try:
        return any(record["kind"] == "validation" for record in read_metrics(run))
    except InputError:
        return False
