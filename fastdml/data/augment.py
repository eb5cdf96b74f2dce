"""The random choices of augmentation for a batch, and the batch itself in plain torch calls.

The result has the same bits as that of the kernel in `fastdml_kernels.augment`, whose docstring
describes the choices and why the bits agree. Cost: about a dozen calls that each pass over the
batch, in blocks that fit the cache of a CPU. 64 images of 128x64 resized to 256x128, cropped and
erased take a core of an AMD EPYC 48 ms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastdml_kernels.augment_options import LARGEST_RESIZE, Augment, erasing_shapes
from torch import Tensor

from fastdml.data.philox import EPOCH, ERASE, draw, uniform
from fastdml.errors import InputError

BLOCK = 8  # images at a time on a CPU, so that results between two passes stay in its cache


class Choices(NamedTuple):
    """What happens to each image of a batch; all (B,) int64."""

    top: Tensor  # of the crop in the padded image, 0 to 2 pad
    left: Tensor
    flip: Tensor  # 0 or 1
    erase_top: Tensor  # in the output; below 0 where cutout sticks out
    erase_left: Tensor
    erase_rows: Tensor  # 0: nothing is erased
    erase_columns: Tensor


def options(
    stored: tuple[int, int],
    train: bool,
    *,
    size: tuple[int, int] | None,
    pad: int,
    padding: str,
    flip: bool,
    erase: float,
    cutout: int,
) -> Augment:
    """A loader's arguments, checked; in evaluation only the size counts. stored and size: (height,
    width). Raises InputError for values out of range, with the range."""
    height, width = size or stored
    if height < 1 or width < 1:
        raise InputError(f"images of {height}x{width}: give at least one pixel")
    for have, make in ((stored[0], height), (stored[1], width)):
        if have * make > LARGEST_RESIZE:
            raise InputError(
                f"resizing {have} to {make} pixels: the product may be {LARGEST_RESIZE} at most"
            )
    if not train:
        return Augment(height, width)
    if padding not in ("reflect", "black"):
        raise InputError(f"padding {padding!r}: give 'reflect' or 'black'")
    if padding == "reflect" and not 0 <= pad < min(height, width):
        raise InputError(
            f"pad {pad}: reflection needs 0 to {min(height, width) - 1} for {height}x{width} images"
        )
    if pad < 0:
        raise InputError(f"pad {pad}: give 0 or more")
    if not 0 <= erase <= 1:
        raise InputError(f"erasing with probability {erase}: give 0 to 1")
    if cutout < 0:
        raise InputError(f"cutout of {cutout} pixels: give 0 or more")
    return Augment(height, width, pad, padding == "reflect", flip, erase, cutout)


def choose(
    what: Augment, seed: int, epoch: int, samples: Tensor, repetitions: Tensor | None = None
) -> Choices:
    """The choices for `samples` (B,) int64 in this epoch, on their device."""
    again = 0 if repetitions is None else repetitions
    nothing = torch.zeros_like(samples)
    top = left = flip = nothing
    if what.pad or what.flip:
        _, top, left, flip = draw(seed, epoch, samples, EPOCH, again)
        top, left = uniform(top, 2 * what.pad + 1), uniform(left, 2 * what.pad + 1)
        flip = uniform(flip, 2) if what.flip else nothing
    if not what.erase:
        return Choices(top, left, flip, nothing, nothing, nothing, nothing)
    shapes = torch.tensor(
        erasing_shapes(what.height, what.width, what.cutout), device=samples.device
    )
    whether, shape, above, before = draw(seed, epoch, samples, ERASE, again)
    rows, columns = shapes[uniform(shape, len(shapes))].unbind(1)
    if what.cutout:
        above = uniform(above, what.height) - rows // 2
        before = uniform(before, what.width) - columns // 2
    else:
        above = uniform(above, what.height - rows + 1)
        before = uniform(before, what.width - columns + 1)
    rows = torch.where(whether < round(what.erase * 2**32), rows, 0)
    return Choices(top, left, flip, above, before, rows, columns)


def taps(size: int, out: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear taps: for each of `out` positions the two of `size` that it lies between, and the
    second's weight in 256ths. Half-pixel centres; three (out,) int64."""
    position = torch.arange(out, device=device)
    at = ((2 * position + 1) * size - out).clamp_(min=0)
    at = (at * 256 + out) // (2 * out)
    first = (at >> 8).clamp_(max=size - 1)
    return first, (first + 1).clamp_(max=size - 1), at & 255


def source(start: Tensor, count: int, size: int, reflect: bool) -> tuple[Tensor, Tensor]:
    """For the `count` positions of a padded line from `start` (B,) on: the positions in the
    unpadded line of `size` that they read, and whether they lie within it; (B, count) both."""
    position = start[:, None] + torch.arange(count, device=start.device)
    if reflect:
        position = position.abs()
        position = torch.where(position < size, position, 2 * (size - 1) - position)
    inside = (position >= 0) & (position < size)
    return torch.where(inside, position, 0), inside


def erase_(images: Tensor, choices: Choices) -> Tensor:
    """Sets the chosen rectangles of `images` (B, H, W, ch) to 0, the mean colour."""
    _, height, width, ch = images.shape
    i, j = (torch.arange(size, device=images.device) for size in (height, width))
    top, left = choices.erase_top[:, None], choices.erase_left[:, None]
    rows = (i >= top) & (i < top + choices.erase_rows[:, None])
    columns = (j >= left) & (j < left + choices.erase_columns[:, None])
    where = rows[:, :, None] & columns.repeat_interleave(ch, 1)[:, None, :]
    return images.masked_fill_(where.view(images.shape), 0.0)


def batch(
    images: Tensor,  # (N, H, W, ch) uint8
    samples: Tensor,  # (B,) int64
    mean: Tensor,  # (ch,) float32
    scale: Tensor,  # (ch,) float32
    what: Augment,
    choices: Choices,
) -> Tensor:
    """Augmented images (B, height, width, ch) float32, on the device of `images`."""
    size = len(samples), what.height, what.width, images.shape[-1]
    out = torch.empty(size, device=images.device)
    block = BLOCK if images.device.type == "cpu" else max(len(samples), 1)
    for start in range(0, len(samples), block):
        part = slice(start, start + block)
        chosen = Choices(*(choice[part] for choice in choices))
        _fill(out[part], images[samples[part]], mean, scale, what, chosen)
    return out


def _fill(
    out: Tensor,  # (B, height, width, ch)
    x: Tensor,  # (B, H, W, ch) uint8
    mean: Tensor,
    scale: Tensor,
    what: Augment,
    choices: Choices,
) -> None:
    B, H, W, ch = x.shape
    height, width = what.height, what.width
    row, row_inside = source(choices.top - what.pad, height, height, what.reflect)
    column, column_inside = source(choices.left - what.pad, width, width, what.reflect)
    mirrored = choices.flip[:, None] == 1
    column = torch.where(mirrored, column.flip(1), column)
    column_inside = torch.where(mirrored, column_inside.flip(1), column_inside)

    # Arithmetic runs over lines of width * ch values: an inner loop over ch is several times slower
    def along(values: Tensor) -> Tensor:  # (B, width) -> (B, 1, width * ch) float32
        return values.float().repeat_interleave(ch, 1).unsqueeze(1)

    def down(values: Tensor) -> Tensor:  # (B, height) -> (B, height, 1) float32
        return values.float().unsqueeze(2)

    def at_columns(where: Tensor) -> Tensor:  # (B, width) -> (B, H, width * ch)
        lines = torch.arange(B * H, device=x.device).view(B, H, 1) * W
        pixels = x.view(-1, ch).index_select(0, (lines + where[:, None]).view(-1))
        return pixels.view(B, H, width * ch).float()

    def at_rows(y: Tensor, where: Tensor) -> Tensor:  # (B, height) -> (B, height, width * ch)
        lines = torch.arange(B, device=x.device).view(B, 1) * H + where
        return y.view(B * H, -1).index_select(0, lines.view(-1)).view(B, height, -1)

    # every value is a multiple of 2**-16 below 2**8: exact in float32
    first, second, weight = (t[column] for t in taps(W, width, x.device))
    y = at_columns(first).lerp_(at_columns(second), along(weight / 256))
    if what.pad and not what.reflect:
        y *= along(column_inside)
    first, second, weight = (t[row] for t in taps(H, height, x.device))
    z = out.view(B, height, width * ch)
    torch.lerp(at_rows(y, first), at_rows(y, second), down(weight / 256), out=z)
    if what.pad and not what.reflect:
        z *= down(row_inside)
    z.sub_(mean.repeat(width)).mul_(scale.repeat(width))  # in this order: see the kernel
    if what.erase:
        erase_(out, choices)
