"""The options of augmentation, for the kernel and for the loaders that make the same batches
without it; needs neither torch nor triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

CROP, ERASE = 0, 2  # purposes in Philox's counter; 1 is for drawing subsets
LARGEST_RESIZE = 1 << 21  # stored size times made size: positions in 512ths of it stay in int32


@dataclass(frozen=True)
class Augment:
    """The steps of augmentation. `height` and `width` are the output's; images of another size are
    resized to it first, and padding and crop count pixels of the output."""

    height: int
    width: int
    pad: int = 0
    reflect: bool = True  # else the border is black
    flip: bool = False
    erase: float = 0.0  # probability
    cutout: int = 0  # side of the erased square; 0: a rectangle of random size (Zhong et al. 2017)


@lru_cache(maxsize=16)
def erasing_shapes(height: int, width: int, cutout: int = 0) -> tuple[tuple[int, int], ...]:
    """The (rows, columns) that an erased rectangle may have, all equally likely.

    Cutout has one. For random erasing the area is uniform in 2 to 40 % of the image and the aspect
    in 0.3 to 1 / 0.3 (the middles of 64 x 64 equal intervals). Shapes that do not fit are left out,
    which gives the distribution of drawing again until one fits.
    """
    if cutout:
        return ((cutout, cutout),)
    shapes = []
    for a in range(64):
        area = (0.02 + 0.38 * (a + 0.5) / 64) * height * width
        for r in range(64):
            aspect = 0.3 + (1 / 0.3 - 0.3) * (r + 0.5) / 64
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < rows < height and 0 < columns < width:
                shapes.append((rows, columns))
    return tuple(shapes) or ((height, width),)


def bytes_moved(stored: Sequence[int], what: Augment, itemsize: int) -> int:
    """The least bytes an image `stored` as (H, W, ch) costs: read once, written once."""
    H, W, ch = stored
    return H * W * ch + what.height * what.width * ch * itemsize
