"""`fastdml plan`: which mesh of devices would train a cohort fastest, and what it would cost."""

from __future__ import annotations

import argparse
import json

from fastdml.cli.parsing import Parser

LINKS = ("nvlink", "pcie", "ethernet100")


def plan(args: list[str]) -> None:
    """predict memory, step time and traffic of peers on several devices, and recommend a mesh"""
    options = _parser().parse(args)

    from fastdml.cli.runs import find_own_models
    from fastdml.data.registry import dataset
    from fastdml.devices import choose_device, device_name
    from fastdml.plan import find_link, make_plan
    from fastdml.plan.inputs import shape_and_classes
    from fastdml.plan.text import describe

    find_own_models(options.peers)
    image_shape, classes = shape_and_classes(
        dataset(options.data), options.image_size, options.classes
    )
    found = make_plan(
        options.peers,
        options.gpus,
        find_link(options.link, bandwidth=options.bandwidth, latency=options.latency),
        nodes=options.nodes,
        network=find_link(
            options.network,
            bandwidth=options.network_bandwidth,
            latency=options.network_latency,
        ),
        num_classes=classes,
        image_shape=image_shape,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        optimizer=options.optimizer,
        amp=options.amp,
        step_ms=options.step_ms,
        share_ms=options.share_ms,
        memory_gb=options.memory,
        device=options.device,
    )
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    where = device_name(choose_device(options.device))
    print(describe(found, where, _command(options), measured=options.step_ms is None))


def _command(options: argparse.Namespace) -> list[str]:
    """`fastdml train` with what the plan is of, where it is not the default."""
    words = ["fastdml", "train", options.data, "--peers", *options.peers]
    for name, default in (
        ("batch_size", 64), ("accumulate", 1), ("optimizer", "sgd"), ("amp", "auto"),
    ):  # fmt: skip
        value = getattr(options, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _parser() -> Parser:
    parser = Parser("plan", plan)
    add = parser.add_argument
    add("--peers", nargs="+", required=True, metavar="MODEL", help="as fastdml train takes them")
    add("--gpus", type=int, required=True, metavar="N", help="devices, on all nodes together")
    add("--link", choices=LINKS, required=True, help="between the devices of a node")
    add(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="of the link, one direction, as measured; in place of what its maker states",
    )
    add("--latency", type=float, metavar="US", help="of the link, microseconds a hop")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    add(
        "--network",
        choices=LINKS,
        default="ethernet100",
        help="between nodes, one a node (default: %(default)s)",
    )
    add("--network-bandwidth", type=float, metavar="GB/S", help="of the network, as measured")
    add("--network-latency", type=float, metavar="US", help="of the network, a hop")
    add("--data", default="cifar100", help="whose images and classes (default: %(default)s)")
    add("--classes", type=int, metavar="N", help="where only the files of --data tell")
    add("--image-size", type=int, metavar="N", help="pixels a side, likewise")
    add(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images of the whole batch (default: %(default)s)",
    )
    add("--accumulate", type=int, default=1, metavar="N", help="parts of it (default: 1)")
    add(
        "--optimizer",
        choices=("sgd", "adam", "adamw"),
        default="sgd",
        help="(default: %(default)s)",
    )
    add(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="precision (default: %(default)s)",
    )
    add(
        "--step-ms",
        type=float,
        nargs="+",
        metavar="MS",
        help="of each peer alone with the whole batch; without it they are measured here",
    )
    add(
        "--share-ms",
        type=float,
        nargs="+",
        metavar="MS",
        help="the same with batch size / gpus images: what of a step does not shrink",
    )
    add("--memory", type=float, metavar="GB", help="of a device, to leave out what does not fit")
    add("--device", default="auto", help="that measures (default: %(default)s)")
    add("--json", action="store_true", help="print all figures, in seconds and bytes")
    return parser
