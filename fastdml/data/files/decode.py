"""One image file to bytes (H, W, 3), by Pillow: about 0.2 ms for a Market-1501 crop.

The policy, which DALI's decoder shares for JPEG: RGB, greyscale repeated, CMYK converted; the EXIF
orientation is applied, so that a picture lies as a viewer shows it; an EXIF block that cannot be
read counts as none. A file that is not wholly decodable is bad.

Other modes become RGB as by Pillow's `convert("RGB")`, which torchvision's ImageFolder calls: a
palette's colours are looked up, and transparency is dropped, so that a transparent pixel has the
colour that the file stores for it. Grey of 16 bits alone differs: it is scaled to 8, where
`convert` would clip it to white. Pixels of 32 bits, whose range no file tells, are refused.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.errors import InputError, require

if TYPE_CHECKING:
    import numpy as np

    from fastdml.image_record import Resize


LARGEST = 1 << 26  # pixels that a header may claim; checked before anything is decoded
# The formats that Pillow may recognise a file as, whatever its name. Not EPS, for which it would
# run another program, Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF", "TIFF")


class BadImage(InputError):
    """A file that cannot be decoded; `reason` alone says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}: restore it, or set bad_files to skip")
        self.path, self.reason = str(path), reason


def decode(
    path: str | Path, size: tuple[int, int] | None = None, resize: Resize = "stretch"
) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of one file, brought to `size` (height, width) by `resized`. Raises
    BadImage for a file that is not there or cannot be decoded, MissingExtra without Pillow."""
    import numpy as np

    pillow = require("PIL.Image", "train")
    with _named(path):
        check_file(path)
        content = Path(path).read_bytes()
    if not content:
        raise BadImage(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable headers
            image = pillow.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > LARGEST:
                raise BadImage(
                    path, f"claims {image.width}x{image.height} pixels, more than {LARGEST:,}"
                )
            image = upright_rgb(image)
            return np.asarray(image if size is None else resized(image, size, resize))
    except BadImage:
        raise
    except pillow.UnidentifiedImageError:
        raise BadImage(path, "not an image that can be decoded") from None
    except _Refused as error:
        raise BadImage(path, str(error)) from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(path, _one_line(error)) from None


class _Refused(ValueError):
    """An image that can be decoded, but is not made into RGB of this size; the text says why."""


def upright_rgb(image: Any) -> Any:
    """A PIL image decoded, turned as its EXIF orientation says and made RGB, as the top of this
    file says. Raises ValueError for pixels of 32 bits, and whatever Pillow raises."""
    operations = require("PIL.ImageOps", "train")
    unknown = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")
    image.load()
    with contextlib.suppress(Exception):  # whatever a broken EXIF block makes it raise
        image = operations.exif_transpose(image)
    if image.mode.startswith("I"):  # of PNG and PPM mode "I" holds 16 bits too
        image = _of_16_bits(image)
        unknown = unknown or image is None
    if unknown:
        raise _Refused("its pixels are 32-bit numbers, whose range is unknown: save it in 8 or 16")
    return image.convert("RGB")


def _of_16_bits(image: Any) -> Any:
    """Grey of 16 bits as grey of 8, the high byte of each pixel, as Pillow reads RGB of 16 bits and
    torchvision scales integers; None where a value has more than 16 bits."""
    import numpy as np

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        return None
    return require("PIL.Image", "train").fromarray((values >> 8).astype(np.uint8))


def resized(image: Any, size: tuple[int, int], resize: Resize) -> Any:
    """A PIL image brought to `size` (height, width) by Pillow's bilinear filter, which averages
    when it shrinks; of that size it is left as it is.

    "stretch" changes the proportions. "crop" keeps them: the image is resized until it just covers
    `size`, and the middle is cut out. For a square that is what torchvision's
    `Resize(side)` and `CenterCrop(side)` do with a PIL image, bit for bit. Raises ValueError where
    "crop" would make an enormous image of a narrow one.
    """
    bilinear = require("PIL.Image", "train").Resampling.BILINEAR
    height, width = size
    if resize == "stretch":
        same = size == (image.height, image.width)
        return image if same else image.resize((width, height), bilinear)
    if image.height * width >= image.width * height:  # the width decides
        cover = width, int(width * image.height / image.width)
    else:
        cover = int(height * image.width / image.height), height
    if cover[0] * cover[1] > max(LARGEST, image.width * image.height):
        raise _Refused(f"{image.width}x{image.height} pixels are too narrow for {width}x{height}")
    if cover != image.size:
        image = image.resize(cover, bilinear)
    left, top = (
        round((have - want) / 2) for have, want in zip(cover, (width, height), strict=True)
    )
    return image.crop((left, top, left + width, top + height))


def check_file(path: str | Path) -> None:
    """Raises BadImage where reading could wait for ever, as from a pipe. Costs a stat."""
    with _named(path):
        regular = stat.S_ISREG(os.stat(path).st_mode)
    if not regular:
        raise BadImage(path, "not a file")


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BadImage(path, "the file is not there") from None
    except OSError as error:
        raise BadImage(path, f"cannot be read ({error.strerror})") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"cannot be decoded ({text or type(error).__name__})"
