"""`fastdml export`: the peers of a run as files for other programs."""

from __future__ import annotations

from fastdml.cli.parsing import Parser, as_folder
from fastdml.cli.runs import add_run_options, run_cohort
from fastdml.errors import InputError


def export(args: list[str]) -> None:
    """write the peers of a run as safetensors, ONNX or torch.export files"""
    parser = Parser("export", export)
    add_run_options(parser)
    parser.add_argument(
        "--peer",
        default="all",
        metavar="PEER",
        help="all: each in a file; best: the one with the best score; its name or number; "
        "ensemble: all as one (default: all)",
    )
    parser.add_argument(
        "--format",
        default="onnx",
        metavar="FORMAT",
        help="safetensors: weights that plain torch and fastdml.load read; onnx; torch-export: a "
        "program, NN-peer.pt2 (default: onnx)",
    )
    parser.add_argument(
        "--to", type=as_folder, metavar="DIR", help="folder to write into (default: RUN/export)"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of the images to export for (default: those that the peers were trained on)",
    )
    options = parser.parse(args)
    to = options.to or options.run / "export"
    if options.size and min(options.size) < 1:
        raise InputError(f"--size {options.size[0]} {options.size[1]}: give 1 or more")

    import torch

    from fastdml.cohort_export import check_format
    from fastdml.model_card import write_card
    from fastdml.train.config.sources import is_known
    from fastdml.train.run_weights import best_peer, run_config

    check_format(options.format)
    config = run_config(options.run)
    cohort = run_cohort(options, "cpu")
    peer = options.peer
    if peer == "best":
        peer = best_peer(options.run, options.weights, cohort.names)
    if cohort.image_shape is None and not options.size and options.format != "safetensors":
        why = "are of an earlier version and " if is_known(config.data) else ""
        raise InputError(
            f"the weights of {options.run} {why}do not say what images they were trained on: give "
            "--size HEIGHT WIDTH"
        )
    example = torch.zeros(1, cohort.in_channels, *options.size) if options.size else None
    paths = cohort.export(to, example, options.format, peer=peer)
    each = range(len(cohort)) if peer == "all" else [peer]
    for path, one in zip(paths, each, strict=True):
        print(path)
        write_card(path, cohort, one, options.run, options.weights)
