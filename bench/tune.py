"""Measures tiles of the loss kernels on a GPU, and writes the best into the package's table.

    python -m bench.tune                      at most 3 minutes, the shapes below in their order
    python -m bench.tune --dry-run sm_90      what would be measured, compiled; needs no GPU

For each shape the candidates are compiled first. One that spills, that a multiprocessor cannot
hold, or whose losses or gradients are not those of the tile in use is left out, with the reason in
the printed table. The others are timed in turns, cold in the L2 cache; one replaces the tile in use
where it is faster by more than `MARGIN`. After each shape the file is replaced at once by one with
its entry: a run that is stopped keeps what it has, and the next goes on with the shapes that have
none (`--again` measures all). kernels/README.md describes the file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from fastdml_kernels import static_report
from fastdml_kernels.launch import launch
from fastdml_kernels.options import Options
from fastdml_kernels.static_report import DTYPES, KernelReport
from fastdml_kernels.tiles import (
    TABLE,
    Regime,
    Tile,
    architecture,
    choose,
    programs_per_sm,
    read_table,
)

from bench import timing

SECONDS = 180.0
MARGIN = 0.02  # of the time of the tile in use: less is noise
BYTES = 512 << 20  # of a shape's logits: ten times an H100's L2, so that every call begins cold
NO_TIME = "no time"
LEAST = 5.0  # seconds left below which no shape is begun
NO_GPU = "bench.tune measures on a CUDA device and finds none: --dry-run ARCH lists the candidates"


class Shape(NamedTuple):
    K: int
    C: int
    dtype: str = "bf16"
    regime: Regime = "wide"

    def __str__(self) -> str:
        return f"{self.regime} {self.K} x {self.C} {self.dtype}"

    @property
    def size(self) -> int:
        """Bytes of a logit."""
        return DTYPES[self.dtype].itemsize

    @property
    def samples(self) -> int:
        return BYTES // (self.K * self.C * self.size)


# The classes of an entry reach from one of these to the next, or to the end.
CLASSES = (1, 16_385, 65_537)
SHAPES = (
    Shape(2, 128_256), Shape(4, 128_256), Shape(2, 32_768), Shape(4, 1000, regime="register"),
    Shape(8, 32_768), Shape(1, 128_256), Shape(4, 32_768), Shape(2, 100, regime="register"),
)  # fmt: skip


def where(shape: Shape) -> dict[str, Any]:
    """The shapes to which an entry applies: those like the one that was measured."""
    if shape.regime == "register":
        tiles = read_table()["default"]
        logits = shape.K * (1 << max(1, (shape.C - 1).bit_length()))
        spans = [e.logits for e in tiles if e.kernel == "register"]
        low, high = next(span for span in spans if span[0] <= logits <= span[1])
        return {"kernel": "register", "logits": [low, high]}
    low = max(c for c in CLASSES if c <= shape.C)
    ends = [c - 1 for c in CLASSES if c > shape.C]
    return {"kernel": "wide", "peers": [shape.K] * 2, "classes": [low, ends[0] if ends else None],
            "pairs": False, "size": shape.size}  # fmt: skip


def entry(shape: Shape, tile: Tile) -> dict[str, Any]:
    """An entry of the table."""
    if shape.regime == "register":
        return where(shape) | {"rows": tile.rows, "warps": tile.warps}
    names = ["block_c", "warps", "stages", "back_stages"]
    if tile.programs != by_cache(shape, tile):
        names.append("programs")
    return where(shape) | {name: getattr(tile, name) for name in names}


def by_cache(shape: Shape, tile: Tile) -> int:
    """The programs a multiprocessor that an entry without a number of them has."""
    row_bytes = shape.K * shape.C * shape.size
    return programs_per_sm(shape.regime, replace(tile, programs=None), row_bytes)


def in_use(shape: Shape, arch: str | None) -> Tile:
    options = Options()
    return choose(
        shape.K, shape.C, options, gradient=True, stats=False, upstream=None, regime=shape.regime,
        size=shape.size, arch=arch,
    )[1]  # fmt: skip


def candidates(shape: Shape, used: Tile) -> list[Tile]:
    """The tile in use, then others near it."""
    if shape.regime == "register":
        near = [
            replace(used, rows=rows, warps=warps)
            for rows in (used.rows, used.rows * 2, used.rows // 2)
            for warps in (used.warps, used.warps * 2, used.warps // 2)
            if rows and warps
        ]
    else:
        programs = used.programs or by_cache(shape, used)
        used = replace(used, programs=programs)
        stages = [(3, 3), (3, 1), (4, 4), (1, 1)]
        near = [replace(used, programs=p, stages=s, back_stages=b)
                for p in (programs, programs + 1) for s, b in stages]  # fmt: skip
        near += [replace(used, block_c=2 * used.block_c, warps=2 * used.warps, stages=s,
                         back_stages=b) for s, b in stages[:2]]  # fmt: skip
        near += [replace(used, block_c=used.block_c // 2, warps=warps, programs=programs * 2)
                 for warps in (used.warps // 2, used.warps) if warps]  # fmt: skip
    return list(dict.fromkeys([used, *near]))


def refused(report: KernelReport, tile: Tile) -> str | None:
    """Why a compiled tile is not worth a measurement."""
    if report.spills or report.stack_bytes:
        return f"spills ({report.spills})"
    resident = report.bound.resident
    if resident is not None and resident < max(1, tile.programs or 1):
        return f"{resident} programs fit"
    return None


class Gauge(Protocol):
    """What compiles and measures: `Device`, or a stand-in in tests."""

    def reports(
        self, shape: Shape, tiles: Sequence[Tile], seconds: float
    ) -> list[KernelReport | str]:
        """A report for each tile, or why there is none; waits for them for so long."""
        ...

    def differs(self, shape: Shape, tile: Tile, used: Tile) -> str | None:
        """Runs both: why the tile's results are not those of the tile in use, None if they are."""
        ...

    def times(self, shape: Shape, tiles: Sequence[Tile], seconds: float) -> dict[Tile, float]:
        """Seconds a launch, measured in turns for about so long."""
        ...


@dataclass
class Row:
    """A candidate's line in the printed table."""

    tile: Tile
    report: KernelReport | None = None
    note: str = ""
    seconds: float | None = None


def measure(
    shape: Shape, arch: str, gauge: Gauge, until: float, clock: Callable[[], float]
) -> tuple[Tile | None, list[Row]]:
    """The shape's best tile, None where there was no time or the tile in use does not run, and all
    candidates. Half of the time up to `until` is for compiling and comparing."""
    start = clock()
    used, *others = candidates(shape, in_use(shape, arch))
    rows = [Row(tile) for tile in (used, *others)]
    reports = gauge.reports(shape, [row.tile for row in rows], (until - start) / 2)
    for row, report in zip(rows, reports, strict=True):
        if isinstance(report, str):
            row.note = report
        else:
            row.report, row.note = report, refused(report, row.tile) or ""
    rows[0].note = ""  # the tile in use is what others are compared with, whatever it is
    fit = []
    for row in rows:
        if row.note:
            continue
        if fit and clock() - start > (until - start) / 2:
            row.note = NO_TIME
            continue
        row.note = gauge.differs(shape, row.tile, used) or ""
        if not row.note:
            fit.append(row)
    if not fit or fit[0] is not rows[0] or clock() >= until:
        return None, rows
    times = gauge.times(shape, [row.tile for row in fit], until - clock())
    for row in fit:
        row.seconds = times[row.tile]
    best = min(fit, key=lambda row: times[row.tile])
    if times[best.tile] > (1 - MARGIN) * times[used]:
        best = rows[0]
    best.note = "best"
    return best.tile, rows


def lists_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries by architecture; the package's for a file that is yet to be written."""
    path = path if path.exists() else TABLE
    read_table(path)  # refuses what is broken
    return json.loads(path.read_text(encoding="utf-8"))


def write_entry(path: Path, arch: str, new: Mapping[str, Any]) -> None:
    """Replaces the entry for the same shapes, or adds one. The file is complete at every moment."""
    lists = lists_of(path)
    same = {"kernel", "logits", "peers", "classes", "pairs", "size"}
    shapes = {name: new[name] for name in same & new.keys()}
    kept = [e for e in lists.get(arch, []) if {n: e[n] for n in same & e.keys()} != shapes]
    lists[arch] = [*kept, dict(new)]
    blocks = (
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(e)}" for e in entries) + "\n  ]"
        for name, entries in lists.items()
    )
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
        read_table(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def unmeasured(shapes: Sequence[Shape], path: Path, arch: str) -> list[Shape]:
    """Those without an entry of the architecture's own."""
    own = lists_of(path).get(arch, [])
    return [s for s in shapes if not any(where(s).items() <= e.items() for e in own)]


def tune(
    shapes: Sequence[Shape],
    arch: str,
    gauge: Gauge,
    path: Path,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Shape, Tile | None, list[Row]]]:
    """Measures shape after shape, and writes each one's entry before the next begins; each has an
    equal share of the time that is left."""
    end = clock() + seconds
    for place, shape in enumerate(shapes):
        now = clock()
        if end - now < LEAST:
            return
        best, rows = measure(shape, arch, gauge, now + (end - now) / (len(shapes) - place), clock)
        if best is not None:
            write_entry(path, arch, entry(shape, best))
        yield shape, best, rows


def compiled_report(shape: Shape, tile: Tile, arch: str) -> KernelReport | str:
    """For a process of its own: the static report, or the compiler's last words."""
    try:
        return static_report.report(
            shape.K, shape.C, shape.dtype, arch, regime=shape.regime, tile=tile
        )
    except Exception as error:  # whatever the compiler raises: the candidate is left out
        return "does not compile: " + (str(error).strip().splitlines() or [repr(error)])[-1][:60]


class Device:
    """The machine's GPU."""

    def __init__(self, arch: str, pool: ProcessPoolExecutor) -> None:
        self.arch, self.pool = arch, pool
        self.made: tuple[Shape, dict[str, Any]] | None = None
        self.expected: tuple[Tile, list[torch.Tensor]] | None = None

    def reports(
        self, shape: Shape, tiles: Sequence[Tile], seconds: float
    ) -> list[KernelReport | str]:
        end = time.monotonic() + seconds
        under_way = [self.pool.submit(compiled_report, shape, tile, self.arch) for tile in tiles]
        found: list[KernelReport | str] = []
        for future in under_way:
            try:
                found.append(future.result(max(0.0, end - time.monotonic())))
            except FutureTimeout:
                future.cancel()
                found.append(NO_TIME)
        return found

    def _inputs(self, shape: Shape) -> dict[str, Any]:
        if self.made is None or self.made[0] != shape:
            self.made = self.expected = None  # frees the last shape's memory first
            draw = torch.Generator("cuda").manual_seed(0)
            size = (shape.samples, shape.C)
            logits = [torch.randn(size, generator=draw, device="cuda", dtype=DTYPES[shape.dtype])
                      for _ in range(shape.K)]  # fmt: skip
            labels = torch.randint(shape.C, size[:1], generator=draw, device="cuda")
            self.made = shape, {"logits": logits, "labels": labels,
                                "grads": [torch.empty_like(z) for z in logits]}  # fmt: skip
        return self.made[1]

    def _launch(self, shape: Shape, tile: Tile) -> torch.Tensor:
        return launch(**self._inputs(shape), options=Options(), regime=shape.regime, tile=tile)[0]

    def _results(self, shape: Shape, tile: Tile) -> list[torch.Tensor]:
        """The losses, and rows of the gradients."""
        grads = self._inputs(shape)["grads"]
        for g in grads:
            g.fill_(float("nan"))  # what is not written shows
        losses = self._launch(shape, tile)
        rows = torch.arange(0, shape.samples, max(1, shape.samples // 64), device="cuda")
        return [losses.double(), *(g[rows].double() * shape.samples for g in grads)]

    def differs(self, shape: Shape, tile: Tile, used: Tile) -> str | None:
        try:
            found = self._results(shape, tile)
            if self.expected is None or self.expected[0] != used:
                self.expected = used, found if tile == used else self._results(shape, used)
        except Exception as error:
            return f"does not run: {str(error).strip().splitlines()[-1][:60]}"
        ulp = torch.finfo(DTYPES[shape.dtype]).eps
        for position, (a, b) in enumerate(zip(found, self.expected[1], strict=True)):
            close = {"rtol": ulp, "atol": 1e-6} if position else {"rtol": 1e-5, "atol": 1e-5}
            if not torch.allclose(a, b, **close):
                return "other results"
        return None

    def times(self, shape: Shape, tiles: Sequence[Tile], seconds: float) -> dict[Tile, float]:
        def timer(tile: Tile) -> timing.Timer:
            def seconds_of(calls: int) -> float:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._launch(shape, tile)  # keeps the device busy while the host issues the others
                start.record()
                for _ in range(calls):
                    self._launch(shape, tile)
                end.record()
                end.synchronize()
                return start.elapsed_time(end) / 1000

            return seconds_of

        names = {str(tile): tile for tile in tiles}
        timers = {name: timer(tile) for name, tile in names.items()}
        samples = timing.interleave(timers, seconds, fewest=3, most=50)
        return {names[name]: statistics.median(found) for name, found in samples.items()}


def table(shape: Shape, rows: Sequence[Row]) -> str:
    lines = [f"{shape}: logits of {shape.samples} samples"]
    lines.append(f"  {'rows':>4}{'block':>6}{'warps':>6}{'stages':>7}{'back':>5}{'an_SM':>6}"
                 f"{'regs':>6}{'spills':>7}{'shared':>7}{'us':>9}{'GB/s':>7}")  # fmt: skip
    for row in rows:
        t, r = row.tile, row.report
        line = (f"  {t.rows:>4}{t.block_c:>6}{t.warps:>6}{t.stages:>7}{t.back_stages:>5}"
                f"{t.programs or '-':>6}")  # fmt: skip
        line += f"{r.registers:>6}{r.spills:>7}{r.shared_bytes:>7}" if r else " " * 20
        if row.seconds is not None:
            moved = 2 * shape.K * shape.C * shape.size * shape.samples  # read and written once
            line += f"{row.seconds * 1e6:>9.1f}{moved / row.seconds / 1e9:>7.0f}"
        else:
            line += " " * 16
        lines.append(f"{line}  {row.note}".rstrip())
    return "\n".join(lines)


def dry_run(shapes: Sequence[Shape], arch: str) -> None:
    for shape in shapes:
        rows = []
        for tile in candidates(shape, in_use(shape, arch)):
            report = compiled_report(shape, tile, arch)
            if isinstance(report, str):
                rows.append(Row(tile, note=report))
            else:
                rows.append(Row(tile, report, refused(report, tile) or ""))
        print(table(shape, rows), flush=True)


def shape_of(text: str) -> Shape:
    """Peers and classes, as in "2x32768": in bfloat16, of the kernel that they get."""
    try:
        K, C = (int(part) for part in text.split("x"))
        if min(K, C) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: give peers and classes, as in 2x32768"
        ) from None
    regime = choose(K, C, Options(), gradient=True, stats=False, upstream=None)[0]
    return Shape(K, C, regime=regime)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Measure tiles and write the best into the table."
    )
    parser.add_argument("--dry-run", metavar="ARCH", choices=[*static_report.TARGETS],
                        help="compile and list the candidates; needs no GPU")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="KxC")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="at most (default: 180)")
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="the file to write (default: the package's)"
    )
    parser.add_argument("--again", action="store_true", help="measure what has an entry too")
    given = parser.parse_args(arguments)
    try:
        lists_of(given.table)
    except ValueError as error:
        parser.error(str(error))
    folder = given.table.resolve().parent
    if not (given.dry_run or os.access(folder, os.W_OK)):
        parser.error(f"--table: cannot write to {folder}; give a file elsewhere")
    if given.dry_run:
        dry_run(given.shapes, given.dry_run)
        return
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    begun = time.monotonic()
    arch = architecture(torch.device("cuda", torch.cuda.current_device()))
    if arch not in static_report.TARGETS:
        sys.exit(f"bench.tune checks for spills on {', '.join(static_report.TARGETS)}, not {arch}")
    shapes = given.shapes if given.again else unmeasured(given.shapes, given.table, arch)
    with ProcessPoolExecutor(
        min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    ) as pool:
        left = given.seconds - (time.monotonic() - begun)
        for shape, _, rows in tune(shapes, arch, Device(arch, pool), given.table, left):
            print(table(shape, rows), flush=True)
    done = unmeasured(given.shapes, given.table, arch)
    print(f"{arch}: {len(given.shapes) - len(done)} of {len(given.shapes)} shapes have an entry")


if __name__ == "__main__":
    main()
