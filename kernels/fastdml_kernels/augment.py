"""A batch of augmented images from a set that stays in device memory, in one launch.

gather - resize (bilinear) - pad (reflection or black) - crop - flip - normalise - erase - cast,
from bytes (N, H, W, ch) to a channels_last batch; the labels are gathered by the same launch.

Bytes an image, the least there is: H * W * ch read once, H' * W' * ch * itemsize written once. A
CIFAR image in bf16 is 3,072 + 6,144 bytes; a Market-1501 image of 128x64 resized to 256x128,
24,576 + 196,608. A program takes some rows of one image. Writes are contiguous, 16 bytes a
thread; reads are single bytes, whose addresses lie side by side except at the flip and the border,
so a row comes from DRAM once and from L1 afterwards. What depends on a row alone or on a column
alone is computed once a row or a column of the tile.

Choices are a pure function of (seed, epoch, sample, repetition): Philox-4x32-10, integers only.

    counter (epoch, sample, CROP, repetition)    word 1: top   word 2: left   word 3: flip
            (epoch, sample, ERASE, repetition)   word 0: whether   1: shape   2: top   3: left

The result is the same to the last bit on a GPU, in Triton's interpreter and in plain torch or
numpy, whether or not a compiler fuses a multiplication with an addition:
- normalising is (x - mean) * (1 / std), one subtraction and then one multiplication, which cannot
  be fused; each is rounded once;
- bilinear weights are multiples of 1/256 (half-pixel centres, no antialiasing, as in
  `interpolate(align_corners=False)`), so that the four products and their sum are integers below
  2**24 and 2**-16 times them is exact. The weights' rounding changes a pixel by one grey level at
  most, and by nothing where a size is doubled: the weights are then quarters.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_options import CROP, ERASE, Augment, erasing_shapes
from .launch_plan import Planned

TILE, TILE_RESIZED = 4096, 2048  # elements a program computes; a resize holds four times as many
WARPS = 4


@triton.jit
def pick(word, n):
    """An integer in [0, n) from 32 random bits."""
    return tl.umulhi(word, n.to(tl.uint32)).to(tl.int32)


@triton.jit
def taps(position, SIZE: tl.constexpr, OUT: tl.constexpr):
    """Bilinear taps: the two of SIZE rows (or columns) that output row `position` of OUT lies
    between, and the second's weight in 256ths."""
    at = tl.maximum((2 * position + 1) * SIZE - OUT, 0)
    at = (at * 256 + OUT) // (2 * OUT)
    first = tl.minimum(at >> 8, SIZE - 1)
    return first, tl.minimum(first + 1, SIZE - 1), at & 255


@triton.jit
def source(position, OUT: tl.constexpr, REFLECT: tl.constexpr):
    """The position in the image that a position in the padded image reads, and whether it is inside
    the image."""
    if REFLECT:
        position = tl.abs(position)
        position = tl.where(position < OUT, position, 2 * (OUT - 1) - position)
    inside = (position >= 0) & (position < OUT)
    return tl.where(inside, position, 0), inside


# Batches of an odd size are slices of an order whose alignment alternates.
@triton.jit(
    do_not_specialize=["seed", "epoch"],
    do_not_specialize_on_alignment=["labels", "samples", "repetitions", "out_labels"],
)
def augment_batch(
    images,  # (N, H, W, CH) uint8
    labels,  # (N,) int64
    samples,  # (B,) int64
    repetitions,  # (B,) int64: which showing of the sample in the epoch; or None, all 0
    mean,  # (CH,) float32
    scale,  # (CH,) float32, 1 / std
    shapes,  # (SHAPES, 2) int32, or None without ERASE_BELOW
    out,  # (B, OUT_H, OUT_W, CH)
    out_labels,  # (B,) int64
    seed, epoch,  # epoch: a number, or (1,) int64 with EPOCH_POINTER
    H: tl.constexpr, W: tl.constexpr, CH: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    PAD: tl.constexpr, REFLECT: tl.constexpr, FLIP: tl.constexpr,
    ERASE_BELOW: tl.constexpr, SHAPES: tl.constexpr, CUTOUT: tl.constexpr,
    EPOCH_POINTER: tl.constexpr, FOR_CROP: tl.constexpr, FOR_ERASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (B, row blocks of an image)."""
    b = tl.program_id(0)
    sample = tl.load(samples + b)
    if tl.program_id(1) == 0:
        tl.store(out_labels + b, tl.load(labels + sample))

    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # rows of the output
    e = tl.arange(0, COLUMNS)  # columns of the output times channels
    j = e // CH
    c = e % CH

    if EPOCH_POINTER:
        c0 = tl.load(epoch).to(tl.uint32)
    else:
        c0 = tl.cast(epoch, tl.int64).to(tl.uint32)
    c1 = sample.to(tl.uint32)
    c3 = c1 * 0
    if repetitions is not None:
        c3 = tl.load(repetitions + b).to(tl.uint32)

    row = i
    column = j
    if PAD > 0 or FLIP:
        _, top, left, mirror = tl.philox(seed, c0, c1, c1 * 0 + FOR_CROP, c3)
        if FLIP:
            column = tl.where(pick(mirror, tl.cast(2, tl.int32)) == 1, OUT_W - 1 - column, column)
        if PAD > 0:
            row += pick(top, tl.cast(2 * PAD + 1, tl.int32)) - PAD
            column += pick(left, tl.cast(2 * PAD + 1, tl.int32)) - PAD
    row, row_inside = source(row, OUT_H, REFLECT)
    column, column_inside = source(column, OUT_W, REFLECT)

    wanted = (i < OUT_H)[:, None] & (e < OUT_W * CH)[None, :]
    inside = wanted & row_inside[:, None] & column_inside[None, :]
    image = images + sample.to(tl.int64) * (H * W * CH)
    if H == OUT_H and W == OUT_W:
        at = (row * (W * CH))[:, None] + (column * CH + c)[None, :]
        x = tl.load(image + at, mask=inside, other=0).to(tl.float32)
    else:
        row_0, row_1, down = taps(row, H, OUT_H)
        column_0, column_1, right = taps(column, W, OUT_W)
        row_0 = (row_0 * (W * CH))[:, None]
        row_1 = (row_1 * (W * CH))[:, None]
        column_0 = (column_0 * CH + c)[None, :]
        column_1 = (column_1 * CH + c)[None, :]
        p00 = tl.load(image + row_0 + column_0, mask=inside, other=0).to(tl.int32)
        p01 = tl.load(image + row_0 + column_1, mask=inside, other=0).to(tl.int32)
        p10 = tl.load(image + row_1 + column_0, mask=inside, other=0).to(tl.int32)
        p11 = tl.load(image + row_1 + column_1, mask=inside, other=0).to(tl.int32)
        upper = p00 * 256 + (p01 - p00) * right[None, :]
        lower = p10 * 256 + (p11 - p10) * right[None, :]
        x = (upper * 256 + (lower - upper) * down[:, None]).to(tl.float32) * (1 / 65536)
    y = (x - tl.load(mean + c)[None, :]) * tl.load(scale + c)[None, :]

    if ERASE_BELOW > 0:
        whether, shape, above, before = tl.philox(seed, c0, c1, c1 * 0 + FOR_ERASE, c3)
        shape = pick(shape, tl.cast(SHAPES, tl.int32))
        rows = tl.load(shapes + 2 * shape)
        columns = tl.load(shapes + 2 * shape + 1)
        if CUTOUT:  # centred on any pixel, and cut off at the edges
            first_row = pick(above, tl.cast(OUT_H, tl.int32)) - rows // 2
            first_column = pick(before, tl.cast(OUT_W, tl.int32)) - columns // 2
        else:
            first_row = pick(above, OUT_H - rows + 1)
            first_column = pick(before, OUT_W - columns + 1)
        erased_rows = (i >= first_row) & (i < first_row + rows)
        erased_columns = (j >= first_column) & (j < first_column + columns)
        erased_rows = erased_rows & (whether.to(tl.int64) < ERASE_BELOW)
        y = tl.where(erased_rows[:, None] & erased_columns[None, :], 0.0, y)

    at = b.to(tl.int64) * (OUT_H * OUT_W * CH) + (i * (OUT_W * CH))[:, None] + e[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=wanted)


@lru_cache(maxsize=64)
def _shape_table(what: Augment, device: torch.device) -> Tensor:
    shapes = erasing_shapes(what.height, what.width, what.cutout)
    return torch.tensor(shapes, dtype=torch.int32, device=device)


def prepare(what: Augment, device: torch.device) -> None:
    """Copies to the device the table that a launch with erasing reads, so that a first launch may
    be captured in a CUDA graph."""
    if what.erase:
        _shape_table(what, torch.empty(0, device=device).device)  # "cuda" with its index


@lru_cache(maxsize=64)
def _tile(what: Augment, H: int, W: int, ch: int) -> tuple[int, int]:
    """Rows and columns (times channels) of the output that a program computes."""
    columns = triton.next_power_of_2(max(what.width * ch, 2))
    elements = TILE if (what.height, what.width) == (H, W) else TILE_RESIZED
    rows = min(max(elements // columns, 1), triton.next_power_of_2(what.height))
    return rows, columns


def _values(
    images: Tensor, labels: Tensor, samples: Tensor, mean: Tensor, scale: Tensor, what: Augment,
    *, seed: int, epoch: int | Tensor, repetitions: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:  # fmt: skip
    """The kernel's run-time arguments, outputs included."""
    B, device = len(samples), images.device
    shapes = _shape_table(what, device) if what.erase else None
    out = torch.empty((B, what.height, what.width, images.shape[3]), dtype=dtype, device=device)
    out_labels = torch.empty(B, dtype=torch.int64, device=device)
    return (
        images, labels, samples, repetitions, mean, scale, shapes, out, out_labels, seed, epoch
    )  # fmt: skip


def _constants(values: tuple[Any, ...], what: Augment) -> dict[str, Any]:
    named = dict(zip(_augment_batch.names, values, strict=True))
    _, H, W, ch = named["images"].shape
    rows, columns = _tile(what, H, W, ch)
    shapes = named["shapes"]
    return dict(
        H=H, W=W, CH=ch, OUT_H=what.height, OUT_W=what.width,
        PAD=what.pad, REFLECT=what.reflect, FLIP=what.flip,
        ERASE_BELOW=round(what.erase * 2**32), SHAPES=0 if shapes is None else len(shapes),
        CUTOUT=what.cutout > 0,
        EPOCH_POINTER=isinstance(named["epoch"], Tensor), FOR_CROP=CROP, FOR_ERASE=ERASE,
        ROWS=rows, COLUMNS=columns,
    )  # fmt: skip


_augment_batch = Planned(
    augment_batch, "images", "labels", "samples", "repetitions", "mean", "scale", "shapes", "out",
    "out_labels", "seed", "epoch",
)  # fmt: skip


def arguments(
    images: Tensor, labels: Tensor, samples: Tensor, mean: Tensor, scale: Tensor, what: Augment,
    **rest: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The kernel, its arguments by name, outputs included, and the compiler's options."""
    values = _values(images, labels, samples, mean, scale, what, **rest)
    named = dict(zip(_augment_batch.names, values, strict=True))
    return augment_batch, named | _constants(values, what), {"num_warps": WARPS}


def augment(
    images: Tensor,  # (N, H, W, ch) uint8
    labels: Tensor,  # (N,) int64
    samples: Tensor,  # (B,) int64
    mean: Tensor,  # (ch,) float32
    scale: Tensor,  # (ch,) float32, 1 / std
    what: Augment,
    *,
    seed: int,
    epoch: int | Tensor,  # a tensor, one int64 on the device, where a captured launch replays
    repetitions: Tensor | None = None,  # (B,) int64
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Images (B, ch, height, width), channels_last in `dtype`, and labels (B,)."""
    values = _values(
        images, labels, samples, mean, scale, what, seed=seed, epoch=epoch,
        repetitions=repetitions, dtype=dtype,
    )  # fmt: skip
    B, shape = len(samples), images.shape[1:]
    if B:
        grid = (B, triton.cdiv(what.height, _tile(what, *shape)[0]), 1)
        constants = lambda: _constants(values, what)  # noqa: E731
        _augment_batch(grid, values, (what, shape), constants, num_warps=WARPS)
    _, out, out_labels = values[6:9]
    return out.permute(0, 3, 1, 2), out_labels
