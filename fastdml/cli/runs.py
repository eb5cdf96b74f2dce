"""Runs named on the command line: their options, settings and weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.cli.parsing import Parser, as_folder

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.train.unfinished import Unfinished


def add_run_options(parser: Parser) -> None:
    """Adds the argument RUN, and the option for which of its weights are meant."""
    parser.usage = f"{parser.prog} RUN [OPTIONS]"  # RUN first: after --peers it would be a peer
    parser.add_argument("run", type=as_folder, metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        help="last: after the last epoch; best: of the best evaluation, which flatters where the "
        "test images chose it (default: best where validation images chose it, else last)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="MODEL",
        help="what to load into, in order; needed where a peer is package.module:function, which "
        "a file in a run folder does not get to import",
    )


def run_weights(options: argparse.Namespace) -> tuple[Unfinished | None, Path]:
    """The folder that the run's weights are in, as `find_weights` says."""
    from fastdml.train.run_weights import find_weights

    _choose_weights(options)
    return find_weights(options.run, options.weights)


def run_cohort(options: argparse.Namespace, device: Any) -> Cohort:
    """The peers of a run with the weights that were asked for, in evaluation mode."""
    from fastdml.train import run_weights

    find_own_models(options.peers or ())
    _choose_weights(options)
    return run_weights.run_cohort(options.run, options.weights, device, options.peers)


def _choose_weights(options: argparse.Namespace) -> None:
    from fastdml.train.run_weights import default_weights

    options.weights = options.weights or default_weights(options.run)


def find_own_models(peers: Sequence[str]) -> None:
    """Puts the current folder on Python's path if some peers are the user's own code, as `python -m
    fastdml` does. Otherwise nothing is imported from there."""
    from fastdml.models.own import is_own

    if any(map(is_own, peers)) and not getattr(sys.flags, "safe_path", False):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
