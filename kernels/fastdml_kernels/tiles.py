"""Which kernel a shape gets, and how much of it a program takes: tiles and sizes of grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import triton
from torch import Tensor

from .options import Options

Regime = Literal["register", "wide"]  # whether a program holds whole rows in registers

# Register rows: (K * BLOCK_C up to, samples a program, warps). Beyond the last limit rows are wide.
# kernels/README.md holds the compiler's registers and spills for each.
REGISTER_TILES = ((64, 16, 4), (1024, 4, 4), (2048, 2, 4), (4096, 1, 4), (8192, 1, 8))
# Wide rows: (K up to, (classes a block, warps), the same where every pair of peers has its own sum,
# that is with statistics or without gradient).
WIDE_TILES = (
    (1, (8192, 8), (8192, 8)),
    (4, (2048, 8), (2048, 8)),
    (8, (1024, 8), (512, 8)),
    (16, (256, 4), (128, 4)),
)
MOST_PEERS = WIDE_TILES[-1][0]  # more peers than this run on the last tile, with spills
PROGRAMS_PER_SM = 8
CACHED_BYTES_PER_SM = 256 << 10  # of logits being walked a second time: a share of H100's 50 MB L2
INTERPRETER_PROGRAMS = 6  # without a GPU: few, so that the walk over row blocks is exercised


@dataclass(frozen=True)
class Tile:
    """How much a program takes at a time."""

    rows: int
    block_c: int
    warps: int


def register_tile(K: int, C: int) -> Tile | None:
    """The tile that holds K rows of C classes in registers, or None where none does."""
    block_c = triton.next_power_of_2(max(C, 2))
    for limit, rows, warps in REGISTER_TILES:
        if K * block_c <= limit:
            return Tile(rows, block_c, warps)
    return None


def wide_tile(K: int, C: int, pairs: bool) -> Tile:
    tiles = next(tiles for limit, *tiles in WIDE_TILES if limit >= K or limit == MOST_PEERS)
    block_c, warps = tiles[pairs]
    block_c = min(block_c, triton.next_power_of_2(max(C, 2)))
    return Tile(1, block_c, min(warps, max(1, block_c // 32)))  # no more threads than classes


def choose(
    K: int, C: int, options: Options, *, gradient: bool, stats: bool, upstream: Tensor | None,
    regime: Regime | None = None, tile: Tile | None = None,
) -> tuple[Regime, Tile]:  # fmt: skip
    """The kernel for a shape, and its tile; `regime` and `tile` are kept where they are given.

    Raises ValueError where the register kernel is asked for and does not have the options, or has
    no tile for rows so wide.
    """
    if regime is None:
        regime = "register" if fits_registers(K, C, options, upstream) else "wide"
    elif regime == "register" and not _has_options(options, upstream):
        raise ValueError(
            "regime='register' has constant teachers, targets 'peers' and 'ensemble', no symmetric "
            f"divergence and no upstream gradient: leave regime out for {options}"
        )
    if tile is None and regime == "register":
        tile = register_tile(K, C)
        if tile is None:
            raise ValueError(
                f"regime='register' holds K x C = {REGISTER_TILES[-1][0]} logits, C rounded up to "
                f"a power of two; for K = {K} peers and C = {C} classes leave regime out"
            )
    elif tile is None:
        tile = wide_tile(K, C, pairs=stats or not gradient)
    return regime, tile


def compiler_options(warps: int, nvidia: bool) -> dict[str, Any]:
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if nvidia and warps == 8:
        # Left to itself, ptxas aims at 64 or 128 registers and spills the few that do not fit.
        options["maxnreg"] = 255
    return options


def _has_options(options: Options, upstream: Tensor | None) -> bool:
    """Whether the register kernel has the options."""
    return (
        options.target in ("peers", "ensemble")
        and not options.symmetric
        and options.detach_targets
        and upstream is None
    )


def fits_registers(K: int, C: int, options: Options, upstream: Tensor | None) -> bool:
    """Whether the register kernel has the options, and room for the rows."""
    return _has_options(options, upstream) and register_tile(K, C) is not None
