"""`fastdml evaluate`: scores of the peers of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastdml.cli.parsing import Parser
from fastdml.cli.runs import add_run_options, run_cohort, run_config, run_weights
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.train import TrainConfig


def evaluate(args: list[str]) -> None:
    """score the peers of a run on its test images, or on its queries and gallery"""
    parser = Parser("evaluate", evaluate)
    add_run_options(parser)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the data set's files (default: the one that the run was trained from)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch CIFAR-10 or CIFAR-100 into the folder of --data where it is missing",
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    of_retrieval = parser.add_argument_group("re-identification runs only")
    of_retrieval.add_argument(
        "--no-rerank", action="store_true", help="leave out the scores after re-ranking"
    )
    of_retrieval.add_argument(
        "--distractors", action="store_true", help="add the 500k distractors to the gallery"
    )
    of_retrieval.add_argument(
        "--ranked-lists",
        type=int,
        default=0,
        metavar="N",
        help="draw N queries and what each peer finds for them, into RUN/ranked_lists",
    )
    options = parser.parse(args)

    from dataclasses import asdict

    import torch

    from fastdml.data import load
    from fastdml.devices import device_name
    from fastdml.engine import cpus
    from fastdml.report.metrics_log import to_json
    from fastdml.report.tables import retrieval_table, scores_table
    from fastdml.train import ReidConfig
    from fastdml.train.run import choose_device
    from fastdml.train.run import evaluate as evaluate_images
    from fastdml.train.tasks import reid

    config = run_config(options.run).replace(device=options.device)
    retrieval = isinstance(config, ReidConfig)
    wanted = [n for n in ("no_rerank", "distractors", "ranked_lists") if getattr(options, n)]
    if wanted and not retrieval:
        option = f"--{wanted[0].replace('_', '-')}"
        raise InputError(f"{option} is for runs on market1501; {options.run} is on {config.data}")
    if options.ranked_lists < 0:
        raise InputError(f"--ranked-lists {options.ranked_lists}: give 0 or more")
    device = choose_device(config)
    torch.set_num_threads(cpus.sensible())
    data = _evaluated_set(options, config)
    cohort = run_cohort(options, device)
    _check_trained_on(cohort, data, options.run)
    root = options.data or config.root
    if retrieval:
        config = config.replace(root=root, download=options.download)
        scores, pictures = reid.evaluate(
            cohort,
            config,
            device,
            rerank=not options.no_rerank,
            distractors=options.distractors,
            ranked_lists=options.ranked_lists,
            folder=options.run / "ranked_lists",
            say=lambda line: print(line, file=sys.stderr),
            hint="--download",
        )
    else:
        _, test = load(data, root, download=options.download, hint="--download")
        scores, pictures = asdict(evaluate_images(cohort, test, amp=config.amp)), []
    if options.json:
        found = {"run": str(options.run), "weights": options.weights, "peers": cohort.names}
        print(to_json({**found, "device": device_name(device), "scores": scores}))
    else:
        table = retrieval_table if retrieval else scores_table
        print(table(cohort.names, scores))
        print(f"{options.weights} weights of {options.run}, on {device_name(device)}")
        for path in pictures:
            print(path)
    if cohort.image_shape is None and not retrieval:
        print(
            f"the weights of {options.run} are of an earlier version and do not say what images "
            f"they were trained on: taken for those of {data}, as config.yaml says",
            file=sys.stderr,
        )


def _evaluated_set(options: argparse.Namespace, config: TrainConfig) -> str:
    """The data set to score a run on: its own or, of a run of `fit` on data of one's own, the one
    that these data were, if any."""
    from fastdml import data
    from fastdml.cohort_files import read_record
    from fastdml.train import ReidConfig
    from fastdml.train.config.sources import is_known

    if is_known(config.data):
        return config.data
    found, folder = run_weights(options)
    found = read_record(folder) if found is None else found.record()
    how = "fastdml.train.evaluate(cohort, batches) scores it on batches (images, labels)"
    if isinstance(config, ReidConfig):
        how = "fastdml.train.extract_features and fastdml.metrics.reid_scores score it"
    else:
        for name in data.dataset_names("classification"):
            if data.record(name) == found:
                return name
    raise InputError(
        f"{options.run} was trained by fit on {config.data}, which the command cannot read: in "
        f"Python, with cohort = fastdml.Cohort.load({str(folder)!r}), {how}"
    )


def _check_trained_on(cohort: Cohort, data: str, run: Path) -> None:
    """Refuses to score peers on images that are not of the kind that they were trained on."""
    from fastdml.data import dataset_names, record

    if data not in dataset_names("classification"):
        return
    known, found = record(data), cohort.record()
    wrong = [name for name, value in found.items() if value not in (None, known[name])]
    if len(known["classes"]) != cohort.num_classes:
        raise InputError(
            f"the peers of {run} tell {cohort.num_classes} classes apart, and {data} has "
            f"{len(known['classes'])}: they were not trained on it"
        )
    if wrong:
        raise InputError(
            f"the peers of {run} were not trained on {data}: the {wrong[0]} of their images was "
            f"{str(found[wrong[0]])[:60]}, and of {data} it is {str(known[wrong[0]])[:60]}"
        )
    channels = known["image_shape"][0]
    if all(cohort.models) and cohort.in_channels != channels:
        raise InputError(
            f"the peers of {run} take images of {cohort.in_channels} channels, and those of {data} "
            f"have {channels}: they were not trained on it"
        )
