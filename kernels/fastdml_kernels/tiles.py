"""Which kernel a shape gets, and how much of it a program takes: tiles and sizes of grids.

Tiles are data: `tile_table.json` has lists by architecture ("sm_90"), and "default" for what an
architecture does not list. `bench/tune.py` measures tiles on a GPU and writes its architecture's
list; kernels/README.md describes the file, and has the compiler's registers and spills.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from .options import Options

Regime = Literal["register", "wide"]  # whether a program holds whole rows in registers

TABLE = Path(__file__).with_name("tile_table.json")
PROGRAMS_PER_SM = 8  # of wide rows at most; and where nothing tells how many are resident
CACHED_BYTES_PER_SM = 256 << 10  # of logits being walked a second time: a share of H100's 50 MB L2
INTERPRETER_PROGRAMS = 6  # without a GPU: few, so that the walk over row blocks is exercised
Span = tuple[int, float]  # from, up to and with


@dataclass(frozen=True)
class Tile:
    """How much a program takes at a time."""

    rows: int
    block_c: int
    warps: int
    # Wide rows: a pass over the row loads this many blocks at once, all but one of them ahead. 1:
    # each is loaded when its turn comes.
    stages: int = 1
    back_stages: int = 1  # the same for the second pass, which walks backwards
    programs: int | None = None  # a multiprocessor; None: what the cache's share allows


@dataclass(frozen=True)
class Entry:
    """Shapes, and their tile. Of register rows it holds no block_c, which is C rounded up."""

    kernel: Regime
    tile: Tile
    logits: Span = (1, math.inf)  # register rows: K times C, C rounded up to a power of two
    peers: Span = (1, math.inf)
    classes: Span = (1, math.inf)
    # Whether every pair of peers has its own sum, that is with statistics or without gradient.
    pairs: bool | None = None  # None: both
    size: int | None = None  # bytes of a logit; None: any

    def fits(self, K: int, C: int, pairs: bool | None, size: int | None) -> bool:
        logits = K * triton.next_power_of_2(max(C, 2))
        spans = ((self.logits, logits), (self.peers, K), (self.classes, C))
        return (
            all(low <= value <= high for (low, high), value in spans)
            and self.pairs in (None, pairs)
            and self.size in (None, size)
        )


Table = Mapping[str, Sequence[Entry]]  # by architecture; the first entry that fits counts
_NUMBERS = {  # least and most; a power of two, of which a kernel's blocks are made
    "rows": (1, 1024, True), "block_c": (2, 65536, True), "warps": (1, 32, True),
    "stages": (1, 8, False), "back_stages": (1, 8, False), "programs": (1, 32, False),
}  # fmt: skip
_NEEDED = {"register": {"rows", "warps"}, "wide": {"block_c", "warps"}}
_OPTIONAL = {
    "register": {"logits"},
    "wide": {"peers", "classes", "pairs", "size", "stages", "back_stages", "programs"},
}


def _entry(given: Any) -> Entry:
    """An entry of the file. Raises ValueError for what no kernel can be."""
    kernel = given.get("kernel") if isinstance(given, dict) else None
    if kernel not in _NEEDED:
        raise ValueError('"kernel" is "register" or "wide"')
    names = set(given) - {"kernel"}
    if not _NEEDED[kernel] <= names <= _NEEDED[kernel] | _OPTIONAL[kernel]:
        wrong = (_NEEDED[kernel] - names) | (names - _NEEDED[kernel] - _OPTIONAL[kernel])
        raise ValueError(f"missing or unknown: {', '.join(sorted(wrong))}")
    tile = {"rows": 1, "block_c": 0} | {name: given[name] for name in names & set(_NUMBERS)}
    for name in names & set(_NUMBERS):
        least, most, power = _NUMBERS[name]
        value = given[name]
        if type(value) is not int or not least <= value <= most or (power and value & (value - 1)):
            kind = "a power of two" if power else "a whole number"
            raise ValueError(f'"{name}" is {kind} from {least} to {most}, not {value!r}')
    where: dict[str, Any] = {}
    for name in names & {"logits", "peers", "classes"}:
        where[name] = _span(name, given[name])
    if type(given.get("pairs")) not in (bool, type(None)):
        raise ValueError('"pairs" is true, false or null')
    if given.get("size") not in (None, 2, 4):
        raise ValueError('"size" is 2, 4 or null: bytes of a logit')
    where |= {name: given[name] for name in names & {"pairs", "size"}}
    return Entry(kernel, Tile(**tile), **where)


def _span(name: str, value: Any) -> Span:
    if isinstance(value, list) and len(value) == 2:
        low, high = value[0], math.inf if value[1] is None else value[1]
        whole = type(low) is int and (type(high) is int or value[1] is None)
        if whole and 1 <= low <= high:
            return low, high
    raise ValueError(f'"{name}" is [from, up to], or null for no end, not {value!r}')


def read_table(path: Path = TABLE) -> Table:
    """The tiles of a file like `tile_table.json`. Raises ValueError for a file that is broken: a
    tile is never left out silently."""
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(lists, dict) or not all(isinstance(e, list) for e in lists.values()):
            raise ValueError("it is an object of lists by architecture")
        table: dict[str, list[Entry]] = {}
        for name, entries in lists.items():
            table[name] = []
            for place, given in enumerate(entries):
                try:
                    table[name].append(_entry(given))
                except ValueError as wrong:
                    raise ValueError(f"{name}, entry {place}: {wrong}") from None
        _check_default(table.get("default", []))
    except (OSError, ValueError) as wrong:
        raise ValueError(
            f"tiles {path} cannot be used: {wrong}. Restore the file: it comes with the package, "
            "and in a clone `git checkout` brings it back"
        ) from None
    return table


def _check_default(entries: Sequence[Entry]) -> None:
    """The default must have a tile for every wide row."""
    for pairs in (False, True):
        reached = 1.0  # peers
        for e in entries:
            everywhere = e.classes == (1, math.inf) and e.size is None and e.pairs in (None, pairs)
            if e.kernel == "wide" and everywhere and e.peers[0] <= reached:
                reached = max(reached, e.peers[1] + 1)
        if reached != math.inf:
            raise ValueError(f'"default" has no tile for wide rows of {reached:.0f} peers')


@cache
def table() -> Table:
    """The package's tiles."""
    return read_table()


@cache
def architecture(device: torch.device) -> str | None:
    """A device's name in the table; None for a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _find(kernel: Regime, arch: str | None, *shape: Any) -> Tile | None:
    """The tile of the first entry that fits, the architecture's own before the default ones."""
    for entries in (table().get(arch or "", ()), table()["default"]):
        for entry in entries:
            if entry.kernel == kernel and entry.fits(*shape):
                return entry.tile
    return None


def most_logits() -> int:
    """What a program can hold in registers: K times C, C rounded up to a power of two."""
    return int(max(e.logits[1] for e in table()["default"] if e.kernel == "register"))


def register_tile(K: int, C: int, arch: str | None = None) -> Tile | None:
    """The tile that holds K rows of C classes in registers, or None where none does."""
    block_c = triton.next_power_of_2(max(C, 2))
    if K * block_c > most_logits():
        return None
    tile = _find("register", arch, K, C, None, None)
    return tile and replace(tile, block_c=block_c)


def wide_tile(
    K: int, C: int, pairs: bool, size: int | None = None, arch: str | None = None
) -> Tile:
    """The tile for wide rows; `pairs`, `size` as in `Entry`."""
    tile = _find("wide", arch, K, C, pairs, size)
    assert tile is not None  # see _check_default
    block_c = min(tile.block_c, triton.next_power_of_2(max(C, 2)))
    blocks = triton.cdiv(C, block_c)
    return replace(
        tile,
        block_c=block_c,
        warps=min(tile.warps, max(1, block_c // 32)),  # no more threads than classes
        stages=min(tile.stages, blocks),
        back_stages=min(tile.back_stages, blocks),
    )


def lane(tile: Tile, logits: Sequence[Tensor]) -> int:
    """Classes of a block that one thread of `wide_rows` sums by itself: at most 16 bytes, which one
    load brings; the whole block where a thread has but one class."""
    size = max(z.element_size() for z in logits)
    classes = min(16 // size, tile.block_c // (32 * tile.warps))
    return classes if classes > 1 else tile.block_c


def programs_per_sm(regime: Regime, tile: Tile, row_bytes: int, resident: int | None = None) -> int:
    """Programs a multiprocessor; row_bytes: of all peers' logits of one sample; resident: how many
    it holds at once (`occupancy.resident_programs`), None where that is not known.

    No more than are resident, since those behind them would start with nothing left to overlap
    with. Wide rows are read twice: all that are walked at once should fit into the L2 cache.
    """
    programs = PROGRAMS_PER_SM if resident is None else resident
    if tile.programs is not None:
        programs = tile.programs if resident is None else min(tile.programs, resident)
    elif regime == "wide":
        programs = min(programs, PROGRAMS_PER_SM, CACHED_BYTES_PER_SM // row_bytes)
    return max(1, programs)


def choose(
    K: int, C: int, options: Options, *, gradient: bool, stats: bool, upstream: Tensor | None,
    regime: Regime | None = None, tile: Tile | None = None, size: int | None = None,
    arch: str | None = None,
) -> tuple[Regime, Tile]:  # fmt: skip
    """The kernel for a shape, and its tile; `regime` and `tile` are kept where they are given.

    size: bytes of a logit. arch: a name in the table. Raises ValueError where the register kernel
    is asked for and does not have the options, or has no tile for rows so wide, and where the table
    is broken.
    """
    if regime is None:
        regime = "register" if fits_registers(K, C, options, upstream) else "wide"
    elif regime == "register" and not _has_options(options, upstream):
        raise ValueError(
            "regime='register' has constant teachers, targets 'peers' and 'ensemble', and no "
            f"upstream gradient: leave regime out for {options}"
        )
    if tile is None and regime == "register":
        tile = register_tile(K, C, arch)
        if tile is None:
            raise ValueError(
                f"regime='register' holds K x C = {most_logits()} logits, C rounded up to "
                f"a power of two; for K = {K} peers and C = {C} classes leave regime out"
            )
        if options.divergence == "jsd" and K > 2 and K * tile.rows * tile.block_c > 2048:
            tile = replace(tile, warps=max(8, tile.warps))  # else registers would be spilled
    elif tile is None:
        tile = wide_tile(K, C, stats or not gradient, size, arch)
        if options.target != "peers":  # whose second pass takes all the registers there are
            tile = replace(tile, back_stages=1)
        if options.divergence == "jsd" and K > 2:  # a mean for every pair of peers, in registers
            tile = replace(tile, block_c=min(tile.block_c, max(tile.block_c // 4, 32 * tile.warps)))
    return regime, tile


def compiler_options(warps: int, nvidia: bool) -> dict[str, Any]:
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if nvidia and warps >= 8:
        # Left to itself, ptxas aims at 64 or 128 registers and spills the few that do not fit.
        options["maxnreg"] = min(255, 65536 // (32 * warps))
    return options


def _has_options(options: Options, upstream: Tensor | None) -> bool:
    """Whether the register kernel has the options."""
    return options.target in ("peers", "ensemble") and options.detach_targets and upstream is None


def fits_registers(K: int, C: int, options: Options, upstream: Tensor | None) -> bool:
    """Whether the register kernel has the options, and room for the rows; a mixture for each of
    many pairs takes more room than the rows themselves."""
    tile = register_tile(K, C) if _has_options(options, upstream) else None
    if tile is None:
        return False
    return options.divergence != "jsd" or K <= 2 or (K <= 4 and K * tile.block_c <= 4096)
