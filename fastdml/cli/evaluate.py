"""`fastdml evaluate`: scores of the peers of a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastdml.cli.parsing import Parser
from fastdml.cli.runs import add_run_options, run_cohort, run_weights
from fastdml.errors import InputError

if TYPE_CHECKING:
    from fastdml.train import TrainConfig
    from fastdml.train.tasks.task import Task


def evaluate(args: list[str]) -> None:
    """score the peers of a run on its test images, or on its queries and gallery"""
    import torch

    from fastdml.devices import choose_device, device_name
    from fastdml.engine import cpus
    from fastdml.report.metrics_log import to_json
    from fastdml.train.run_weights import run_config
    from fastdml.train.tasks.task import TASKS, task_of

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
    for task in TASKS:
        group = parser.add_argument_group(f"{task.title} runs only")
        for option, arguments in task.options.items():
            group.add_argument(option, **arguments)
    options = parser.parse(args)

    config = run_config(options.run).replace(device=options.device)
    task = task_of(config)
    _refuse_options_of_others(options, parser, task, config)
    device = choose_device(config.device)
    torch.set_num_threads(cpus.sensible())
    config = config.replace(
        data=_evaluated_set(options, config, task),
        root=options.data or config.root,
        download=options.download,
    )
    cohort = run_cohort(options, device)
    scores, table, pictures, settings = task.evaluate(
        cohort,
        config,
        device,
        vars(options),
        run=options.run,
        hint="--download",
    )
    if options.json:
        found = {"run": str(options.run), "weights": options.weights, "peers": cohort.names}
        found["device"] = device_name(device)
        if settings:
            found["settings"] = dict(settings)
        print(to_json({**found, "scores": scores}))
    else:
        print(table)
        print(f"{_described(options)} of {options.run}, on {device_name(device)}")
        for path in pictures:
            print(path)


def _described(options: argparse.Namespace) -> str:
    """Which weights were scored, and for the best ones what chose them."""
    from fastdml.train.run_weights import chosen_on

    images = chosen_on(options.run) if options.weights == "best" else None
    flatter = ", which flatter them," if images == "test" else ","
    return f"{options.weights} weights" + (
        f", chosen on {images} images{flatter}" if images else ""
    )


def _refuse_options_of_others(
    options: argparse.Namespace, parser: Parser, task: Task, config: TrainConfig
) -> None:
    """Raises InputError for options that belong to another task than the run's."""
    from fastdml.train.tasks.task import TASKS

    for other in TASKS:
        for option in other.options if other is not task else ():
            name = option.removeprefix("--").replace("-", "_")
            if getattr(options, name) != parser.get_default(name):
                sets = " or ".join(other.data)
                raise InputError(
                    f"{option} is for runs on {sets}; {options.run} is on {config.data}"
                )


def _evaluated_set(options: argparse.Namespace, config: TrainConfig, task: Task) -> str:
    """The data set to score a run on: its own or, for a run of `fit` on the caller's data, the one
    that the cohort's record of its images fits, if any."""
    from fastdml.cohort_files import read_record
    from fastdml.train.config.sources import is_known

    if is_known(config.data):
        return config.data
    found, folder = run_weights(options)
    name = task.known_set(read_record(folder) if found is None else found.record())
    if name is None:
        raise InputError(
            f"{options.run} was trained by fit on {config.data}, which the command cannot read: in "
            f"Python, with cohort = fastdml.Cohort.load({str(folder)!r}), {task.in_python}"
        )
    return name
