"""`fastdml reproduce`: the paper's tables and figures, each by one command."""

from __future__ import annotations

import argparse
import textwrap

from fastdml.cli.parsing import Parser, as_folder
from fastdml.errors import InputError

SCALES = ("smoke", "small", "medium", "full", "digits")


def reproduce(args: list[str]) -> None:
    """repeat the paper's experiments over several seeds, and set the results beside its figures"""
    parser = _parser()
    options = parser.parse(args)
    if options.list:
        print(_listed(options.scale))
        return
    if not options.names:
        raise InputError(f"{parser.prog}: name an experiment; --list shows those there are")

    from fastdml.reproduce import run_all

    found = run_all(
        options.names,
        scale=options.scale,
        seeds=options.seeds,
        root=options.root,
        folder=options.folder,
        device=options.device,
        download=options.download,
        jobs=options.jobs,
        grouped=options.grouped,
        price_per_hour=options.price_per_hour,
        dry_run=options.dry_run,
        command=["fastdml", "reproduce", *args],
        hint="--download",
    )
    for one in found:
        print(one)
        print(f"{one.folder} has the table, a CSV, the plots and every number")
    failures = list(dict.fromkeys(line for one in found for line in one.failures))
    if failures:
        more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise InputError(f"not all is there: {failures[0]}{more}; the same command tries again")


def _listed(scale: str) -> str:
    """Experiments, with their rows at a scale, and scales."""
    from fastdml.reproduce import EXPERIMENTS
    from fastdml.reproduce import SCALES as scales

    width = max(map(len, (*EXPERIMENTS, *scales)))
    lines = [f"NAME[:ROW], with the rows at --scale {scale}"]
    for name, experiment in EXPERIMENTS.items():
        lines.append(f"{name:<{width}}  {experiment.title} ({experiment.place})")
        try:
            rows = "  ".join(f":{choice}" for choice in experiment.choices(scales[scale]))
        except InputError:  # it has no such scale
            rows = "none at this scale"
        indent = " " * (width + 2)
        lines += textwrap.wrap(
            rows, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    lines += ["", "--scale"]
    lines += [f"{name:<{width}}  {one.about}" for name, one in scales.items()]
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser("reproduce", reproduce)
    parser.usage = f"{parser.prog} NAME[:ROW] [NAME ...] [OPTIONS]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help="an experiment, such as table2, or rows of one, such as table2:resnet32+resnet32",
    )
    add(
        "--list",
        action="store_true",
        help="show the experiments, their rows at --scale, and the scales",
    )
    add(
        "--scale",
        choices=SCALES,
        default="small",
        help="full: the paper's settings; the others have fewer images and epochs, and say so "
        "(default: %(default)s)",
    )
    add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the scale's number)")
    add("--root", default="data", metavar="DIR", help="of the data sets' files (default: data)")
    add("--download", action="store_true", help="fetch CIFAR into --root where it is missing")
    add(
        "--folder",
        type=as_folder,
        default="reproductions",
        metavar="DIR",
        help="of trainings and results; what is there is used, and gone on with (default: "
        "%(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings at once, each in a process of its own (default: %(default)s)",
    )
    add(
        "--grouped",
        action=argparse.BooleanOptionalAction,
        help="train the seeds of a training together, as groups of peers in one run, where they "
        "can be (default: on a GPU)",
    )
    add("--price-per-hour", type=float, metavar="X", help="of the device: for what it would cost")
    add(
        "--dry-run",
        action="store_true",
        help="say what would be trained, and what it would cost",
    )
    return parser
