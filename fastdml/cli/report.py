"""`fastdml report`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.cli.parsing import Parser, as_folder
from fastdml.errors import InputError
from fastdml.units import size

if TYPE_CHECKING:
    from fastdml.report.run_files import RunFiles
    from fastdml.report.scoring import Scoring
    from fastdml.train.run_weights import Weights

PAGE = "report.html"
MADE_HERE = b'<meta name="generator" content="fastdml '


def report(args: list[str]) -> None:
    """write the results of a run, or of several side by side, as one HTML page"""
    from fastdml.files import write_atomically
    from fastdml.report.html.comparison_page import comparison_page
    from fastdml.report.html.run_page import run_page
    from fastdml.report.metrics_log import group_folders
    from fastdml.report.run_files import read_run

    parser = Parser("report", report)
    parser.usage = f"{parser.prog} RUN [RUN ...] [OPTIONS]"
    parser.add_argument(
        "runs", nargs="+", type=as_folder, metavar="RUN", help="folder of a training run"
    )
    parser.add_argument(
        "--to",
        type=as_folder,
        metavar="FILE",
        help=f"the page to write (default: RUN/{PAGE}; of several runs {PAGE} in this folder)",
    )
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        help="whose scores are shown; best: of the epoch with the best score, which flatters where "
        "test images chose it (default: best where a validation set chose them, else last)",
    )
    parser.add_argument(
        "--analyse",
        action="store_true",
        help="first analyse the peers, where that was not done: how flat their minima are, the "
        "loss between them, how alike their features are and how sure they are; some hundred "
        "evaluations of 1,000 training images; the page of one run shows it",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the data set's files, for --analyse (default: the one that the run was "
        "trained from)",
    )
    options = parser.parse(args)
    if options.data and not options.analyse:
        raise InputError("--data says where --analyse finds the images: give --analyse too")

    path = options.to or (Path(PAGE) if len(options.runs) > 1 else options.runs[0] / PAGE)
    _check_page(path)
    folders = [part for run in options.runs for part in group_folders(run) or [run]]
    if options.analyse:
        _analyse(folders, options.weights, options.data)
    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        run, analyses, alone = _analysed(runs[0])
        page = run_page(
            run,
            _scoring(run),
            defaults=_defaults(run),
            weights=options.weights,
            remedy=_remedy(run),
            analyses=analyses,
            alone=alone,
        )
    else:
        page = comparison_page(runs, [_scoring(run) for run in runs], weights=options.weights)
    write_atomically(path, page)
    print(f"{path}: {size(len(page.encode()))}, opens in any browser, offline")
    if options.analyse and len(runs) > 1:
        print(f"analyses are on the page of one run alone: {parser.prog} {folders[0]}")


def _check_page(path: Path) -> None:
    """Refuses what is not a page, before anything is read."""
    if path.is_dir():
        raise InputError(f"--to {path} is a folder: give a file, for instance {path / PAGE}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--to {path}: the page is HTML, give a name that ends in .html")
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"--to {path} is not a file")
    with path.open("rb") as file:
        if MADE_HERE not in file.read(1000):
            raise InputError(
                f"{path} is there already and is no report: give another name with --to"
            )


def _scoring(run: RunFiles) -> Scoring:
    """That of the run's scores; where it has none, of its task."""
    from fastdml.train.tasks.task import scoring_of, task_for

    scores = run.scores("last")
    return scoring_of(scores) if scores else task_for(_data(run), run.settings).scoring


def _defaults(run: RunFiles) -> dict[str, Any] | None:
    """The settings as its data set has them without any choice; None where that cannot be told."""
    from fastdml.train.config.sources import defaults_beside

    try:
        return defaults_beside({**run.settings, "data": _data(run)}).to_dict()
    except InputError:
        return None


def _analyse(runs: Sequence[Path], weights: Weights | None, data: str | None) -> None:
    import torch

    from fastdml.analysis import analyse
    from fastdml.engine import cpus

    torch.set_num_threads(cpus.sensible())
    for run in runs:
        analyse(run, weights=weights, root=data)


def _analysed(run: RunFiles) -> tuple[RunFiles, dict[str, Any], dict[str, Any]]:
    """What its predictions and its analysis.json tell of a run, and of its independent peers, by
    name; the run with what cannot be read among its problems."""
    from fastdml.analysis import analyse_predictions, current_analyses

    inner, found = run.independent, []
    predictions = inner.predictions if inner else None
    for one, told in (
        (run, analyse_predictions(run.predictions, predictions)),
        (inner, analyse_predictions(predictions)),
    ):
        try:
            found.append({**told, **(current_analyses(one.folder) if one else {})})
        except InputError as error:
            found.append(told)
            run = dataclasses.replace(run, problems=[*run.problems, str(error)])
    return run, found[0], found[1]


def _remedy(run: RunFiles) -> str:
    """How a run gets the predictions that it lacks."""
    from fastdml.peer_groups import run_of
    from fastdml.train.config.sources import is_known

    if not run.ended:
        return "It comes when the run ends."
    if run.chosen_on == "validation" and run.scored_on == "test":
        return ""  # the test set has been read, and is read once
    if is_known(_data(run)):
        folder = shlex.quote(str(run_of(run.folder)))
        return (
            f"fastdml train {_data(run)} --resume --folder {folder} writes it, without training "
            "again, if the test images are where they were."
        )
    return "fit with the same peers and data and config.replace(resume=True) writes it."


def _data(run: RunFiles) -> str:
    data = run.settings.get("data", "cifar100")
    return data if isinstance(data, str) else "?"
