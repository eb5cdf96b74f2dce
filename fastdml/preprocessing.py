"""What makes an image the input of trained peers: the bits that evaluation during training saw.

A file is decoded by the function that training decodes files with, brought to the recorded shape as
the record says, and normalised by the recorded mean and std in the loaders' order of operations.
Around 5 ms for a photograph of half a megapixel, nearly all of it decoding.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from fastdml.data import augment
from fastdml.data.files.decode import BadImage, decode, resized, upright_rgb
from fastdml.data.reid_split import STORED
from fastdml.errors import InputError, one_line, require

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from fastdml.image_record import Resize

logger = logging.getLogger(__name__)

Picture = Union[str, "os.PathLike[str]", "Image", "np.ndarray"]

FAR = 20  # standard deviations: a pixel so far from the mean is not in the units of training


class Preprocessing:
    """Called on an image, gives the tensor (channels, height, width) float32 that the peers take.

    record: of `Cohort.record`. Raises InputError where it does not say the shape, mean and std.

    An image is the path of a file, a PIL image, or an array (H, W) or (H, W, channels) of uint8.
    Of another size than the recorded one, it is resized as the record says; where that is unknown,
    resized until it covers the shape and cut to the middle ("crop"). Peers of one channel get grey,
    peers of three RGB. Raises InputError (BadImage, for a file) for what cannot be made of this
    form.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        needed = ("image_shape", "mean", "std")
        if missing := [name for name in needed if record.get(name) is None]:
            raise InputError(
                f"the {' and '.join(missing)} of the images that these peers were trained on are "
                "not recorded, so nothing says how an image becomes their input: call the "
                "predictor on batches that you prepare yourself"
            )
        self.channels, *size = record["image_shape"]
        self.size: tuple[int, int] = (size[0], size[1])
        self.resize: Resize = record.get("resize") or "crop"
        self.mean = torch.tensor(record["mean"], dtype=torch.float32)
        self.scale = 1 / torch.tensor(record["std"], dtype=torch.float32)
        # Files of re-identification are kept at one size, from which a batch is interpolated.
        self.stored = self.size
        if self.resize == "stretch":
            height, width = record.get("stored") or STORED
            self.stored = (height, width)
        self._warned = False

    def __call__(self, image: Picture) -> Tensor:
        return self.normalized(self.pixels(image))

    def pixels(self, image: Picture) -> np.ndarray:
        """The pixels (height, width, channels) uint8 of an image, at the size it is decoded to."""
        import numpy as np

        if isinstance(image, (str, os.PathLike)):
            if self.channels not in (1, 3):
                raise InputError(self._other_channels(os.fspath(image)))
            return self._in_channels(decode(os.fspath(image), self.stored, self.resize))
        if isinstance(image, np.ndarray):
            image = self._of_array(image)
            if isinstance(image, np.ndarray):
                return image
        if not hasattr(image, "convert"):
            raise InputError(
                "an image is the path of a file, a PIL image or an array (H, W, channels) of "
                f"uint8, not a {type(image).__name__}"
            )
        if self.channels not in (1, 3):
            raise InputError(self._other_channels("a PIL image"))
        try:
            whole = resized(upright_rgb(image), self.stored, self.resize)
        except Exception as error:  # Pillow raises nearly anything for damaged images
            raise InputError(f"the image cannot be read: {one_line(error)}") from None
        return self._in_channels(np.asarray(whole))

    def normalized(self, pixels: np.ndarray) -> Tensor:
        """(channels, height, width) float32 of `pixels`."""
        x = torch.from_numpy(pixels.copy())
        if self.stored == self.size:
            out = x.float().sub_(self.mean).mul_(self.scale)
        else:
            what = augment.options(
                self.stored, False, size=self.size, pad=0, padding="black", flip=False, erase=0,
                cutout=0,
            )  # fmt: skip
            first = torch.zeros(1, dtype=torch.int64)
            choices = augment.choose(what, 0, 0, first)
            out = augment.batch(x[None], first, self.mean, self.scale, what, choices)[0]
        self._check_units(pixels, out)
        return out.permute(2, 0, 1)

    def _in_channels(self, rgb: np.ndarray) -> np.ndarray:
        """RGB (H, W, 3) as this many channels; grey stays the grey it was."""
        import numpy as np

        if self.channels == 3:
            return rgb
        grey = require("PIL.Image", "train").fromarray(rgb).convert("L")
        return np.asarray(grey)[..., None]

    def _of_array(self, array: np.ndarray) -> Any:
        """A PIL image of an array; or of one that is no picture, but has the peers' shape, it."""
        import numpy as np

        if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
            raise InputError(
                f"an array of an image is (H, W) or (H, W, channels) of uint8, not {array.shape} "
                f"of {array.dtype}"
            )
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if self.channels in (1, 3):
            if array.ndim == 3 and array.shape[2] not in (3, 4):
                raise InputError(
                    f"an array of {array.shape} is no image of 1, 3 or 4 channels: give "
                    "(H, W, channels)"
                )
            return require("PIL.Image", "train").fromarray(np.ascontiguousarray(array))
        if array.shape != (*self.size, self.channels):
            raise InputError(self._other_channels(f"an array of {array.shape}"))
        return array

    def _other_channels(self, what: str) -> str:
        return (
            f"{what}: these peers take images of {self.channels} channels, which are prepared as "
            f"an array {(*self.size, self.channels)} of uint8 alone"
        )

    def _check_units(self, pixels: np.ndarray, out: Tensor) -> None:
        """Warns once of pixels that cannot be in the units of training: such as 0 to 255, where it
        was 0 to 16."""
        measured = bool((self.mean > 0).all())  # else nobody looked at the pixels for them
        if self._warned or not measured or float(out.abs().max()) <= FAR:
            return
        self._warned = True
        means = ", ".join(f"{value:.4g}" for value in self.mean.tolist())
        stds = ", ".join(f"{value:.4g}" for value in (1 / self.scale).tolist())
        logger.warning(
            f"pixels run from {pixels.min()} to {pixels.max()}, more than {FAR} standard "
            f"deviations from those that the peers were trained on (mean {means}; std {stds}): are "
            "they in the same units? (digits: 0 to 16)"
        )


def reason(error: InputError) -> str:
    """Of an image that cannot be read: why, without its path."""
    return error.reason if isinstance(error, BadImage) else str(error)


def stacked(images: Sequence[Tensor]) -> Tensor:
    """A batch (N, channels, height, width) in the memory format that training evaluates in."""
    return torch.stack(list(images)).contiguous(memory_format=torch.channels_last)
