"""What peers know of the images they learnt from: their shape, normalisation and classes, and how
images of another size were brought to that shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from fastdml.errors import InputError

FIELDS = ("image_shape", "mean", "std", "classes", "resize", "stored")
Resize = Literal["crop", "stretch"]  # how `data.files.decode.resized` brings them to their shape


def checked_record(values: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The values of `FIELDS` as lists, `resize` as it is, None where unknown."""
    channels = None
    if (shape := values["image_shape"]) is not None:
        shape = _plain(shape)
        if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(f"image_shape must be (channels, height, width), not {shape!r}")
        channels = shape[0]
    found: dict[str, Any] = {"image_shape": shape}
    for name in ("mean", "std"):
        if (numbers := values[name]) is not None:
            numbers = _plain(numbers)
            low = 0 if name == "std" else -math.inf
            if len(numbers) != (channels or len(numbers) or 1) or not all(
                type(n) in (int, float) and low < n < math.inf for n in numbers
            ):
                count = f" for {channels} channels" if channels else ""
                above = " above 0" if name == "std" else ""
                raise InputError(
                    f"{name} must be one finite number{above} a channel{count}, not {numbers!r}"
                )
        found[name] = numbers
    if (classes := values["classes"]) is not None:
        classes = _plain(classes)
        if len(classes) != num_classes or not all(isinstance(c, str) for c in classes):
            raise InputError(
                f"classes must be {num_classes} names, one for each logit, not {str(classes)[:60]}"
            )
    found["classes"] = classes
    if (resize := values["resize"]) is not None and resize not in get_args(Resize):
        raise InputError(f"resize must be one of {', '.join(get_args(Resize))}, not {resize!r}")
    found["resize"] = resize
    if (stored := values["stored"]) is not None:
        stored = _plain(stored)
        if len(stored) != 2 or not all(type(n) is int and n > 0 for n in stored):
            raise InputError(f"stored must be (height, width), not {stored!r}")
    found["stored"] = stored
    return found


def _plain(values: Any) -> list:
    """A sequence, array or tensor as a list of Python's own values; anything else as a list of it,
    which fits nowhere."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values]
    return list(values)
