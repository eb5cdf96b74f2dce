"""Runs named on the command line: their options, settings and weights."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.cli.parsing import Parser, as_folder
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.train import TrainConfig
    from fastdml.train.unfinished import Unfinished


logger = logging.getLogger(__name__)


def add_run_options(parser: Parser) -> None:
    """Adds the argument RUN, and the option for which of its weights are meant."""
    parser.usage = f"{parser.prog} RUN [OPTIONS]"  # RUN first: after --peers it would be a peer
    parser.add_argument("run", type=as_folder, metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        default="last",
        help="last: after the last epoch; best: of the epoch with the best test accuracy or mAP, "
        "which the test images chose and therefore flatter (default: last)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="MODEL",
        help="what to load into, in order; needed where a peer is package.module:function, which "
        "a file in a run folder does not get to import",
    )


def run_config(run: Path) -> TrainConfig:
    """The settings of the run in this folder. Raises InputError where there is no run in it."""
    from fastdml.train.config.sources import load_config

    if not (run / "config.yaml").is_file():
        within = (run.parent / "config.yaml").is_file()
        remedy = f": give the run's folder, {run.parent}" if within else ": it holds no config.yaml"
        raise InputError(f"{run} is not the folder of a run{remedy}")
    return load_config(run / "config.yaml")


def run_weights(options: argparse.Namespace) -> tuple[Unfinished | None, Path]:
    """The folder that a run's weights are in. The last weights of a run that has not ended are in
    its checkpoint: then also what is known of that. Raises InputError where there are none yet."""
    from fastdml.train.unfinished import prolonged, unfinished

    last = options.weights == "last"
    folder = options.run if last else options.run / "best"
    there = (folder / "cohort.json").is_file()
    if there and not (last and prolonged(options.run, run_config(options.run))):
        return None, folder
    found = unfinished(options.run) if last else None
    if found is None and there:
        return None, folder
    if found is None:
        raise InputError(
            f"{options.run} holds no {options.weights} weights: they are written when "
            f"{'training ends' if last else 'an epoch is evaluated'}"
        )
    return found, found.path


def run_cohort(options: argparse.Namespace, device: Any) -> Cohort:
    """The peers of a run with the weights that were asked for, in evaluation mode."""
    from fastdml.cohort import Cohort

    find_own_models(options.peers or ())
    found, folder = run_weights(options)
    if found is None:
        return Cohort.load(folder, device, peers=options.peers)
    cohort = found.cohort(device, options.peers)
    logger.info(found.describe())
    return cohort


def find_own_models(peers: Sequence[str]) -> None:
    """Puts the current folder on Python's path if some peers are the user's own code, as `python -m
    fastdml` does. Otherwise nothing is imported from there."""
    from fastdml.models.own import is_own

    if any(map(is_own, peers)) and not getattr(sys.flags, "safe_path", False):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
