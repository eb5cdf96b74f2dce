"""Fuzz targets: runs whose files are almost right, as the report reads them. See `fuzzing`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from fuzz_registry import rewrite, target
from fuzzing import Check
from mutations import altered, mutated

from fastdml.analysis import analyse_predictions
from fastdml.report.html.comparison_page import comparison_page
from fastdml.report.html.run_page import run_page
from fastdml.report.metrics_log import METRICS
from fastdml.report.predictions import PREDICTIONS, read_predictions
from fastdml.report.run_files import read_run
from fastdml.report.summary import SUMMARY
from fastdml.train.tasks.classification import SCORING

sys.path.append(str(Path(__file__).parents[1] / "report"))  # which pytest does for its tests
from report_runs import Page, analyses, make_run, predictions

NAMES = ["resnet8-1", "resnet8-2"]


@target()
def predictions_file(folder: Path) -> Check:
    run = make_run(folder / "run", predictions(N=12))
    whole = (run / PREDICTIONS).read_bytes()

    def check(random: Random) -> None:
        rewrite(run / PREDICTIONS, mutated(random, whole))
        assert read_predictions(run).num_classes == 3

    return check


@target()
def report_page(folder: Path) -> Check:
    """Anything in a summary or an analysis, and any log that is one, makes a page of whole
    elements."""
    run = make_run(folder / "run", predictions(N=12), independent=True)
    make_run(run / "independent", predictions(N=12), kl_weight=0.0)
    summary = json.loads((run / SUMMARY).read_text())
    told = {**analyse_predictions(*[read_run(run).predictions] * 2), **analyses(NAMES)}
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]

    def check(random: Random) -> None:
        found, log = summary, lines
        for _ in range(random.randint(1, 3)):
            if random.random() < 0.7:
                found = altered(random, found)
            else:
                log = altered(random, log)
        rewrite(run / SUMMARY, json.dumps(found))
        log = log if isinstance(log, list) else [log]
        rewrite(run / METRICS, "".join(f"{json.dumps(line)}\n" for line in log))
        read = read_run(run)
        weights = random.choice((None, "last", "best"))
        if random.random() < 0.7:
            shown = altered(random, told)
            analysed = {"analyses": shown if isinstance(shown, dict) else told, "alone": told}
            page = run_page(read, SCORING, defaults={"lr": 1}, weights=weights, **analysed)
        else:
            page = comparison_page([read, read], [SCORING] * 2, weights=weights)
        assert Page(page).headings[0][0] == 1

    return check
