"""NAME@SIZE: a model that resizes its batch, so that peers of a cohort may see images at sizes of
their own.

The images are resized on the device, by what torch calls bilinear with antialiasing; from one size
to the same that changes nothing.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.errors import InputError

LARGEST = 9999


class AtSize(nn.Module):
    """`model` on images resized to size x size."""

    def __init__(self, model: nn.Module, size: int, num_classes: int) -> None:
        super().__init__()
        self.model, self.size, self.num_classes = model, size, num_classes

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W) -> logits (N, C)."""
        side = self.size, self.size
        return self.model(F.interpolate(x, side, mode="bilinear", antialias=True))

    def extra_repr(self) -> str:
        return f"size={self.size}"


def split_size(name: str) -> tuple[str, int | None]:
    """The model and the size of NAME@SIZE; of a name without @, the name and None. Raises
    InputError where there is an @ without a model before it, or a size behind it."""
    model, at, size = name.partition("@")
    if not at:
        return name, None
    if not model:
        raise InputError(f"no model {name!r}: write a name before the @, as in resnet32@96")
    if not re.fullmatch(r"[1-9]\d{0,3}", size, re.ASCII):
        raise InputError(
            f"no model {name!r}: behind the @ stands one number, the pixels of a side that its "
            f"images are resized to, 1 to {LARGEST}, as in {model}@96"
        )
    return model, int(size)
