"""A model by its name: see `fastdml.models` for the names there are."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import nn

from fastdml.errors import InputError, MissingExtra
from fastdml.models import registry
from fastdml.models.input_size import AtSize, split_size
from fastdml.models.own import call_own, import_own, is_own, nearest_names, taken_by
from fastdml.models.reid_head import ReidHead, ReidModel
from fastdml.models.timm_models import (
    IMAGENET_RESNETS,
    check_size,
    create_timm_model,
    keep_last_stage,
)


class Row(NamedTuple):
    """The row of a model in the table of `fastdml models`."""

    name: str
    parameters: int  # with the classes and channels that `catalogue` was asked for
    input: str  # the images that it takes
    purpose: str
    pretrained: bool = False  # whether there are weights to begin with


def model_names() -> list[str]:
    """Names for help texts and suggestions; other depths and widths work as well."""
    return [name for model in registry.models() for name in model.listed]


def catalogue(num_classes: int = 100, in_channels: int = 3) -> list[Row]:
    """All of `model_names` and, where timm is installed, the ImageNet networks that the names of
    re-identification mean. Parameters are counted in models without memory (on the meta device)."""
    rows = []
    for model in registry.models():
        for name in model.listed:
            count = _count(name, num_classes, in_channels, None)
            rows.append(Row(name, count, model.input, model.purpose))
    try:
        for name in IMAGENET_RESNETS:
            count = _count(name, num_classes, in_channels, ReidHead())
            rows.append(Row(name, count, "any size", "ImageNet's, for re-identification", True))
    except MissingExtra:
        pass
    return rows


def _count(name: str, num_classes: int, in_channels: int, head: ReidHead | None) -> int:
    with torch.device("meta"):
        model = create_model(name, num_classes, in_channels=in_channels, head=head)
    return sum(p.numel() for p in model.parameters())


def create_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    head: ReidHead | None = None,
    pretrained: bool = False,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The model called `name`, with fresh weights from torch's global generator: from images
    (N, in_channels, H, W) to logits (N, num_classes), or with a head as `ReidModel` says.

    name: see `fastdml.models`; NAME@SIZE is NAME on images that it resizes to SIZE x SIZE itself.
    head: what to put on the model's feature map, for re-identification.
    pretrained: begin with timm's weights; for its models alone. The classifier is fresh.
    image_size: (height, width) of the images, which timm's networks of one size are built for; one
        that cannot take them is refused. Ours take any.

    Raises InputError, in one line with the remedy, for a name that is not known (it gives the
    nearest), a user's function that cannot be imported or fails, counts that are no whole numbers
    from 1, a model too large for the memory, and pretrained weights that there are none of;
    MissingExtra where timm is asked for and not installed.
    """
    if not isinstance(name, str):
        raise InputError(f"a model's name is text, such as 'resnet32', not {name!r}")
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    if not (head is None or isinstance(head, ReidHead)):
        raise InputError(f"head must be a ReidHead or None, not {head!r}")
    model_name, size = split_size(name)
    if size is not None:
        if head is not None:
            raise InputError(
                f"model {name!r}: a size behind the name is for classification; re-identification "
                f"resizes all images to height and width: give {model_name}"
            )
        model = create_model(
            model_name,
            num_classes,
            in_channels=in_channels,
            pretrained=pretrained,
            image_size=(size, size),
        )
        return AtSize(model, size, num_classes)
    timm_name = _timm_name(name, head)
    if pretrained and timm_name is None:
        raise InputError(
            f"model {name!r} has no pretrained weights, only models of timm have: name one as "
            "timm:NAME, or set pretrained to false"
        )
    if timm_name is not None:
        model = create_timm_model(
            timm_name,
            num_classes if head is None else 0,
            in_channels,
            pretrained=pretrained,
            image_size=image_size,
        )
        if head is not None and head.last_stride == 1:
            keep_last_stage(model)
    elif is_own(name):
        model = import_own(name, {"num_classes": num_classes, "in_channels": in_channels})
    else:
        model = _registered(name, num_classes, in_channels, head)
    if head is not None:
        model = ReidModel(model, num_classes, head, name=name, in_channels=in_channels)
    if timm_name is not None and image_size is not None:
        check_size(model, timm_name, in_channels, image_size)
    return model


def _timm_name(name: str, head: ReidHead | None) -> str | None:
    """timm's name of the model; None where it is not one of timm's."""
    if name.startswith("timm:"):
        return name.removeprefix("timm:")
    return name if head is not None and name in IMAGENET_RESNETS else None


def _registered(name: str, num_classes: int, in_channels: int, head: ReidHead | None) -> nn.Module:
    """The model that a file of `fastdml.models`, or one of the user's, registers under `name`."""
    found = registry.find(name)
    if found is None:
        raise InputError(
            f"no model {name!r}; {nearest_names(name, model_names())} "
            "(or package.module:function for your own, timm:NAME for one of timm)"
        )
    known, numbers = found
    arguments: dict[str, object] = {"num_classes": num_classes, "in_channels": in_channels}
    if head is not None:
        arguments |= {"large": True, "last_stride": head.last_stride}
    if not known.build.__module__.startswith("fastdml.models."):
        return call_own(name, known.build, arguments, numbers)
    try:
        return known.build(**taken_by(known.build, arguments), **numbers)
    except RuntimeError as error:  # of torch: no memory has so much
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"model {name!r} for {num_classes} classes and {in_channels} channels cannot be "
            f"built here: {reason}"
        ) from None


def check_count(label: str, value: object) -> None:
    """Raises InputError for anything but a whole number from 1 to 2**63 - 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise InputError(f"{label} must be a whole number of at least 1, not {value!r}")
    if int(value) >= 1 << 63:
        raise InputError(f"{label} must be below 2**63, not {value}")
