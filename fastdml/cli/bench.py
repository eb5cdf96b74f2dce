"""`fastdml bench`: how fast this is on this machine, beside the usual loop."""

from __future__ import annotations

import json
import os
import platform
from statistics import median
from typing import TYPE_CHECKING, Any

from fastdml.cli.parsing import Parser

if TYPE_CHECKING:
    from fastdml.machine.bench import Measured

HEAD = ("what", "fastdml", "+-", "usual loop", "+-", "fastdml is")


def bench(args: list[str]) -> None:
    """measure loss and training step against the usual loop on this machine, in a minute"""
    parser = Parser("bench", bench)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long, in all (default: %(default)g)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all samples, in seconds")
    options = parser.parse(args)

    import torch

    from fastdml.devices import choose_device, device_name
    from fastdml.engine import cpus
    from fastdml.machine.bench import check_seconds, measure

    check_seconds(options.seconds)
    device = choose_device(options.device)
    torch.set_num_threads(cpus.sensible())
    where = {"device": device_name(device), **versions()}
    busy = busy_note(os.getloadavg()[0])  # before this adds to it
    if not options.json:
        named = [f"{name} {value}" for name, value in where.items() if name != "device"]
        print(", ".join([where["device"], *named]), flush=True)
    found = list(measure(device, options.seconds))
    if options.json:
        print(
            json.dumps(
                {**where, "busy": bool(busy), "rows": [row._asdict() for row in found]}, indent=1
            )
        )
    else:
        print(table(found))
        if busy:
            print(busy)
    if any(not row.ours for row in found):
        raise SystemExit(1)


def busy_note(load: float) -> str:
    """What to say where other programs use the CPUs; "" where they hardly do. Threads that wait for
    each other are then held up, those of the usual loop most of all. load: average number of
    programs that run."""
    from fastdml import host

    if load < host.cpus() / 2:
        return ""
    return (
        f"other programs use this machine (load {load:.1f} on {host.cpus()} CPUs), so that these "
        "figures say little: end them, or set OMP_NUM_THREADS to the CPUs that are free"
    )


def versions() -> dict[str, Any]:
    """What the figures depend on, beside the device."""
    from importlib import metadata

    import torch

    from fastdml import __version__
    from fastdml.machine.self_test import native_code

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "absent"
    return {
        "fastdml": __version__,
        "native loss": native_code(),
        "torch": torch.__version__,
        "triton": triton,
        "Python": platform.python_version(),
    }


def table(found: list[Measured]) -> str:
    """Medians and spreads, and below what they are."""
    from fastdml.machine.bench import spread, verdict
    from fastdml.report.tables import fixed_columns

    rows: list[tuple[str, ...]] = [HEAD]
    for row in found:
        if not row.ours:
            differs = f"WRONG: results differ by {row.difference:.1e}"
            rows.append((row.name, "-", "-", "-", "-", differs))
            continue
        cells = [
            cell
            for samples in (row.ours, row.usual)
            for cell in (milliseconds(median(samples)), f"{spread(samples):.0%}")
        ]
        rows.append((row.name, *cells, verdict(row)))
    notes = [f"{row.name}: {row.note}" for row in found if row.note]
    counts = sorted({len(row.ours) for row in found if row.ours})
    rounds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"
    return "\n".join(
        [
            fixed_columns(rows, text=(0, 5)),
            f"medians of {rounds} interleaved rounds; +-: half the distance of the quartiles",
            "usual loop: a kl_div for each pair, a backward pass and an optimizer for each peer;",
            "same inputs, weights and precision, first results compared before timing;",
            "memory format: fastdml channels_last, the usual loop torch's default",
            *notes,
        ]
    )


def milliseconds(seconds: float) -> str:
    """Three digits, as in 0.231 ms, 23.1 ms, 2,310 ms."""
    ms = 1e3 * seconds
    digits = 3 if ms < 1 else 2 if ms < 10 else 1 if ms < 100 else 0
    return f"{ms:,.{digits}f} ms"
