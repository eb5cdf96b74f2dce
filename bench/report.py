"""Tables and the roofline plot, from the rows that the benchmarks recorded.

python -m bench.report [--plot roofline.png] FILE.json ...     what --benchmark-json wrote
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # a contender's facts and its median, in seconds

LOSS_NAMES = (
    "direct", "pairwise", "summed", "pairwise-c", "closed", "closed-c", "closed-cg", "pydml",
    "liger", "apex",
)  # fmt: skip
DISTILLATION_NAMES = ("direct", "formula", "formula-c", "formula-cg", "liger")
LOSS_LEGEND = """\
A rival's column: its time divided by ours; below 1 it is faster. "-": not installed, or has no such
time. direct: ours, gradients without autograd (as our training step takes them); pairwise: kl_div a
pair, a backward a peer; summed: the same, one backward; closed: O(K C) in plain torch; -c: under
torch.compile (one backward); -cg: the same with its own CUDA graphs; pydml: pytorch-dml."""
DISTILLATION_LEGEND = """\
One student, one frozen teacher, T = 4. formula: cross_entropy and kl_div (jsd: as Liger and TRL
write it), a line each, and autograd; -c, -cg: under torch.compile; liger: Liger's kernels."""


def machine(device: torch.device) -> str:
    """One line: the hardware and the versions that a figure depends on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
            facts = {key.strip(): value.strip() for key, _, value in fields}
            name = facts.get("model name", name)
            if "avx512_bf16" in facts.get("flags", "").split():
                name += " with avx512_bf16"
    parts = [name, f"CPU threads {torch.get_num_threads()}", f"torch {torch.__version__}"]
    for package in ("triton", "liger-kernel", "pytorch-dml", "pytorch-metric-learning"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def versions(device: torch.device) -> dict[str, Any]:
    """What `machine` says and more, for those who compare stored figures."""
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device)
        found["device"] = {
            "name": has.name, "capability": f"{has.major}.{has.minor}", "bytes": has.total_memory,
            "multiprocessors": has.multi_processor_count, "l2_bytes": has.L2_cache_size,
        }  # fmt: skip
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            found["driver"] = done.stdout.strip().split("\n")[0]
    return found


def commit() -> str:
    """The id of the sources that are measured: git's, or $COMMIT where they are a copy without it;
    otherwise "unknown"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        call += ["--abbrev=40", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    return os.environ.get("COMMIT", "unknown")


def tables(rows: list[Row], where: str) -> str:
    """Every table that the rows allow, under the line that says where they were measured."""
    parts = [where]
    for kind, table in _TABLES:
        if chosen := [row for row in rows if row["bench"] == kind]:
            parts += table(chosen)
    return "\n\n".join(parts)


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple, dict[str, Row]]:
    """Rows by the facts they share, then by name, in the order they came."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["name"]] = row
    return groups


def over_ours(rival: Row, ours: Row) -> float:
    """A rival's time over ours in the same rounds."""
    return rival["median"] / (rival.get("ours_beside") or ours["median"])


def _loss(rows: list[Row]) -> list[str]:
    head = f"{'dtype':<9}{'K':>3}{'N':>6}{'C':>8}"
    parts = []
    for direction, clock in _groups(rows, "direction", "clock"):
        chosen = [r for r in rows if (r["direction"], r["clock"]) == (direction, clock)]
        groups = _groups(chosen, "dtype", "K", "N", "C")
        lines = {
            f"{dtype:<9}{K:>3}{N:>6}{C:>8}": group for (dtype, K, N, C), group in groups.items()
        }
        title = f"mutual loss, {direction.replace('_', ' + ')}"
        parts += _against_ours(title, clock, head, lines, LOSS_NAMES)
    return [*parts, LOSS_LEGEND]


def _distillation(rows: list[Row]) -> list[str]:
    head = f"{'divergence':<11}{'dtype':<9}{'N':>6}{'C':>8}"
    parts = []
    for (clock,) in _groups(rows, "clock"):
        groups = _groups([r for r in rows if r["clock"] == clock], "divergence", "dtype", "N", "C")
        lines = {
            f"{divergence:<11}{dtype:<9}{N:>6}{C:>8}": group
            for (divergence, dtype, N, C), group in groups.items()
        }
        title = "distillation, forward + backward"
        parts += _against_ours(title, clock, head, lines, DISTILLATION_NAMES)
    return [*parts, DISTILLATION_LEGEND]


def _against_ours(
    title: str, clock: str, head: str, lines: dict[str, dict[str, Row]], names: tuple[str, ...]
) -> list[str]:
    """A table of times and ratios, and one of memory where that is known. lines: the beginning of a
    line -> the rows of its contenders, by name."""

    def line(start: str, ours: float, cells: list[str]) -> str:
        return f"{start}{ours:>11.1f}" + "".join(f"{cell:>12}" for cell in cells)

    def memory(row: Row) -> float:
        return row["extra_bytes"] / 2**20

    lines = {start: group for start, group in lines.items() if "ours" in group}
    columns = "".join(f"{name:>12}" for name in names)
    times, memories = [], []
    for start, group in lines.items():
        ours = group["ours"]
        there = [group.get(name) for name in names]
        ratios = [f"{over_ours(row, ours):.2f}" if row else "-" for row in there]
        times.append(line(start, 1e6 * ours["median"], ratios))
        if clock == "wall" and ours["extra_bytes"] is not None:
            extra = [f"{memory(row):.1f}" if row else "-" for row in there]
            memories.append(line(start, memory(ours), extra))
    tables = ["\n".join([f"{title}, {clock} time", f"{head}{'ours us':>11}{columns}", *times])]
    if memories:
        first = f"{title}, peak memory beyond the logits, MiB, no ratios"
        tables.append("\n".join([first, f"{head}{'ours':>11}{columns}", *memories]))
    return tables


def _lines(
    group: dict[str, Row], base: str, images: int, unit: str, per_second: float
) -> list[str]:
    """Time, images a second, and the speed relative to `base`."""
    lines = [f"{'':<34}{unit:>10}{'images/s':>11}{'x ' + base.split()[0]:>15}"]
    for name, row in group.items():
        time = row["median"]
        ratio = f"{group[base]['median'] / time:.2f}" if base in group else "-"
        lines.append(f"{name:<34}{per_second * time:>10.2f}{images / time:>11,.0f}{ratio:>15}")
    return lines


def _step(rows: list[Row]) -> list[str]:
    parts = []
    for (peers, batch), group in _groups(rows, "peers", "batch").items():
        title = f"training step, {peers}, batch {batch}"
        parts.append("\n".join([title, *_lines(group, "pairwise", batch, "ms", 1e3)]))
    return parts


def _end_to_end(rows: list[Row]) -> list[str]:
    parts = []
    for (peers, images, data), group in _groups(rows, "peers", "images", "data").items():
        title = f"one epoch, {peers}, {images:,} images: {data}"
        lines = [title, *_lines(group, "usual loop", images, "s", 1)]
        pages = []
        for name, row in group.items():
            if row["steady"]:
                minutes = 200 * 50_000 / row["steady"] / 60
                rate = f"{row['steady']:,.0f} images/s after its start"
                lines.append(f"{name}: {rate}; 200 epochs of 50,000 would take {minutes:,.1f} min")
            if row["profile"]:
                pages.append(f"{name}, profile\n{row['profile'].rstrip()}")
        parts += ["\n".join(lines), *pages]
    return parts


def _data(rows: list[Row]) -> list[str]:
    parts = []
    for (data, device, batch), group in _groups(rows, "data", "device", "batch").items():
        title = f"input pipelines, {data}, {device}, batch {batch}"
        base = "usual" if "usual" in group else "torchvision"
        parts.append("\n".join([title, *_lines(group, base, batch, "ms a batch", 1e3)]))
    return parts


def _augment(rows: list[Row]) -> list[str]:
    lines = [
        "augmentation kernel, bf16: time on the device, and its byte budget in that time",
        f"{'data':<10}{'batch':>8}{'us':>10}{'images/s':>14}{'GB/s':>8}{'of a copy':>11}",
    ]
    for row in rows:
        time, least = row["median"], row["least_bytes"]
        rate = f"{row['batch'] / time:>14,.0f}{least / time / 1e9:>8,.0f}"
        share = f"{least / time / row['copy_bandwidth']:>11.0%}"
        lines.append(f"{row['data']:<10}{row['batch']:>8,}{1e6 * time:>10.1f}{rate}{share}")
    return ["\n".join(lines)]


def _reid(rows: list[Row]) -> list[str]:
    parts = []
    groups = _groups(rows, "kind", "data", "queries", "gallery", "dims", "device")
    for (kind, data, queries, gallery, dims, device), group in groups.items():
        source = f"features of {dims:,}" if dims else "distances given"
        more = ", 500,000 of them distractors" if data == "distractors" else ""
        lines = [
            f"{kind} of {queries:,} x {gallery:,} images{more}, {source}, {device}",
            f"{'':<34}{'s':>10}{'x slower':>10}{'peak GB':>10}",
        ]
        ours = group.get("ours")
        for name, row in group.items():
            ratio = f"{row['median'] / ours['median']:.1f}" if ours else "-"
            peak = f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "-"
            if row["scored"] < queries:
                name += f" (from {row['scored']} queries)"
            lines.append(f"{name:<34}{row['median']:>10.3f}{ratio:>10}{peak:>10}")
        parts.append("\n".join(lines))
    return [*parts, "Peak memory is that of the whole process, torch and the inputs included."]


def _reid_loss(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "ours"))
    lines = [
        f"losses on features and their gradients, {rows[0]['device']}; a rival: its time over ours",
        f"{'loss':<12}{'N':>6}{'D':>8}{'ours us':>11}" + "".join(f"{n:>12}" for n in names),
    ]
    for (loss, N, D), group in _groups(rows, "loss", "N", "D").items():
        if "ours" in group:
            ours = group["ours"]["median"]
            ratios = [f"{group[n]['median'] / ours:.2f}" if n in group else "-" for n in names]
            line = f"{loss:<12}{N:>6}{D:>8}{1e6 * ours:>11.1f}"
            lines.append(line + "".join(f"{r:>12}" for r in ratios))
    legend = "pml: pytorch-metric-learning; usual: torchreid's triplet loss, BoT's center loss."
    return ["\n".join(lines), legend]


def _reid_training(rows: list[Row]) -> list[str]:
    parts = []
    for (peers, size, batch, data), group in _groups(
        rows, "peers", "size", "batch", "data"
    ).items():
        lines = [
            f"re-identification training, {peers}, {size}, batch {batch}: all that an epoch takes",
            f"stand-in of Market-1501 from {data}",
            f"{'':<34}{'images/s':>10}{'x usual':>10}",
        ]
        base = group.get("usual loop")
        for name, row in group.items():
            ratio = f"{base['median'] / row['median']:.2f}" if base else "-"
            lines.append(f"{name:<34}{1 / row['median']:>10,.1f}{ratio:>10}")
        parts.append("\n".join(lines))
    return parts


_TABLES = (
    ("loss", _loss),
    ("distillation", _distillation),
    ("step", _step),
    ("end_to_end", _end_to_end),
    ("data", _data),
    ("augment", _augment),
    ("reid", _reid),
    ("reid_loss", _reid_loss),
    ("reid_training", _reid_training),
)


def roofline(rows: list[Row], where: str, path: str) -> bool:
    """Least bytes over kernel time, against the bandwidth of a device copy; False without rows."""
    rows = [
        row
        for row in rows
        if row["bench"] == "loss"
        and (row["clock"], row["direction"]) == ("kernel", "forward_backward")
    ]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    names = list(dict.fromkeys(row["name"] for row in rows))
    for name in names:
        chosen = sorted((r for r in rows if r["name"] == name), key=lambda r: r["least_bytes"])
        axes.plot(
            [row["least_bytes"] for row in chosen],
            [row["least_bytes"] / row["median"] / 1e9 for row in chosen],
            marker="o",
            linewidth=2.5 if name == "ours" else 1,
            zorder=3 if name == "ours" else 2,
            label=name,
        )
    copy = rows[0]["copy_bandwidth"] / 1e9
    axes.axhline(copy, color="black", linestyle="--", label=f"device copy, {copy:,.0f} GB/s")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="least bytes: logits read once, gradients written once",
        ylabel="least bytes / kernel time, GB/s",
        title=where,
    )
    axes.title.set_fontsize(8)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True


def check_writable(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Before minutes of measuring: ends with one line where the file for the figures cannot be
    written."""
    try:
        if path:
            path.open("a").close()
    except OSError as error:
        parser.error(f"--json: cannot write to {path}: {error.strerror}; give a file elsewhere")


def load(path: str) -> tuple[list[Row], str]:
    """Rows and the machine's line of a file that --benchmark-json wrote."""
    stored = json.loads(Path(path).read_text())
    rows = [{**b["extra_info"], "median": b["stats"]["median"]} for b in stored["benchmarks"]]
    return rows, stored["machine_info"]["fastdml"]


def by_machine(paths: Iterable[str]) -> dict[str, list[Row]]:
    """The rows of several files, by where they were measured."""
    found: dict[str, list[Row]] = {}
    for path in paths:
        rows, where = load(path)
        found.setdefault(where, []).extend(rows)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--plot", metavar="PNG", help="write the roofline plot here")
    arguments = parser.parse_args()
    machines = by_machine(arguments.files)
    print("\n\n".join(tables(rows, where) for where, rows in machines.items()))
    if arguments.plot:
        drawn = [roofline(rows, where, arguments.plot) for where, rows in machines.items()]
        if not any(drawn):
            print("no kernel times in these files: nothing to plot", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
