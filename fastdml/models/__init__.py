"""Models by name.

    resnet20, resnet32, ...   CIFAR ResNet, any depth 6n + 2
    wrn_28_10, wrn_16_4, ...  Wide ResNet, any depth 6n + 4 and width
    mobilenet, googlenet      their CIFAR forms
    package.module:function   your own, called with num_classes= and in_channels=, as far as its
                              signature names them; num_classes= also goes to **arguments
    timm:NAME                 any model of timm, with pretrained weights if asked

All of the first three kinds take images of 8x8 and up with any number of channels, return logits
(N, C), and offer `forward_features`, `num_features` and `num_classes`.

With `head=ReidHead(...)` a name gives a `ReidModel`: the same backbones, mobilenet and googlenet in
their form for large images, resnet18, 34, 50, 101 and 152 as the ImageNet networks (timm's), and of
your own models and timm's those with a feature map (N, F, H, W) from `forward_features`.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable
from numbers import Integral

from torch import nn

from fastdml.errors import InputError, one_line
from fastdml.models.googlenet import GoogLeNet
from fastdml.models.mobilenet import MobileNet
from fastdml.models.reid_head import ReidHead, ReidModel
from fastdml.models.resnet_cifar import ResNetCifar
from fastdml.models.timm_models import check_size, create_timm_model, keep_last_stage
from fastdml.models.wide_resnet import WideResNet
from fastdml.names import nearest

__all__ = ["ReidHead", "ReidModel", "create_model", "model_names"]

# Depths that everybody reads as the ImageNet network, 50 and 152 of them 6n + 2 as well.
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)


def model_names() -> list[str]:
    """Names for help texts and suggestions; other depths and widths work as well."""
    return [
        "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
        "wrn_16_4", "wrn_28_10", "wrn_40_2", "mobilenet", "googlenet",
    ]  # fmt: skip


def is_own(name: str) -> bool:
    """Whether a name means the user's own code, package.module:function, which it would import."""
    return ":" in name and not name.startswith("timm:")


def create_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    head: ReidHead | None = None,
    pretrained: bool = False,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The model called `name`, with fresh weights from torch's global generator.

    head: what to put on the model's feature map, for re-identification.
    pretrained: begin with timm's weights; for its models alone. The classifier is fresh.
    image_size: (height, width) of the images, which timm's networks of one size are built for; one
        that cannot take them is refused. Ours take any.
    """
    if not isinstance(name, str):
        raise InputError(f"a model's name is text, such as 'resnet32', not {name!r}")
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    if not (head is None or isinstance(head, ReidHead)):
        raise InputError(f"head must be a ReidHead or None, not {head!r}")
    timm_name = name.removeprefix("timm:") if name.startswith("timm:") else None
    if head is not None and name in [f"resnet{depth}" for depth in IMAGENET_DEPTHS]:
        timm_name = name
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
        model = _from_import(name, num_classes, in_channels)
    else:
        try:
            model = _own(name, num_classes, in_channels, head)
        except RuntimeError as error:  # of torch: no memory has so much
            reason = str(error).strip().partition("\n")[0][:200]
            raise InputError(
                f"model {name!r} for {num_classes} classes and {in_channels} channels cannot be "
                f"built here: {reason}"
            ) from None
    if head is not None:
        model = ReidModel(model, num_classes, head, name=name, in_channels=in_channels)
    if timm_name is not None and image_size is not None:
        check_size(model, timm_name, in_channels, image_size)
    return model


def check_count(label: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{label} must be a whole number of at least 1, not {value!r}")
    if value >= 1 << 63:
        raise InputError(f"{label} must be below 2**63, not {value}")


def _own(name: str, num_classes: int, in_channels: int, head: ReidHead | None) -> nn.Module:
    last_stride = 2 if head is None else head.last_stride
    if name in ("mobilenet", "googlenet"):
        kind = MobileNet if name == "mobilenet" else GoogLeNet
        return kind(num_classes, in_channels, large=head is not None, last_stride=last_stride)
    if match := re.fullmatch(r"resnet([1-9]\d{0,3})", name):
        depth = int(match[1])
        if _is_resnet_depth(depth):
            return ResNetCifar(depth, num_classes, in_channels, last_stride=last_stride)
        near = " or ".join(f"resnet{d}" for d in _neighbours(depth, _is_resnet_depth))
        reason = (
            "that name means the ImageNet network"
            if depth in IMAGENET_DEPTHS
            else "a CIFAR ResNet has 6n + 2 layers"
        )
        raise InputError(
            f"no model {name!r}: {reason}; nearest: {near} (ImageNet form: timm:{name})"
        )
    if match := re.fullmatch(r"wrn_([1-9]\d{0,3})_([1-9]\d{0,2})", name):
        depth, width = int(match[1]), int(match[2])
        if _is_wide_depth(depth):
            return WideResNet(depth, width, num_classes, in_channels, last_stride=last_stride)
        near = " or ".join(f"wrn_{d}_{width}" for d in _neighbours(depth, _is_wide_depth))
        raise InputError(f"no model {name!r}: a Wide ResNet has 6n + 4 layers; nearest: {near}")
    raise InputError(
        f"no model {name!r}; {_nearest(name, model_names())} "
        "(or package.module:function for your own, timm:NAME for one of timm)"
    )


def _is_resnet_depth(depth: int) -> bool:
    return depth >= 8 and depth % 6 == 2 and depth not in IMAGENET_DEPTHS


def _is_wide_depth(depth: int) -> bool:
    return depth >= 10 and depth % 6 == 4


def _neighbours(depth: int, valid: Callable[[int], bool]) -> list[int]:
    """The valid depths just below (where there is one) and just above `depth`."""
    below = next(([d] for d in range(depth - 1, 0, -1) if valid(d)), [])
    return [*below, next(d for d in itertools.count(depth + 1) if valid(d))]


def _nearest(name: str, names: Iterable[str]) -> str:
    """The names closest to `name`, for a message; where nothing is close, all, if they are few."""
    names = list(names)
    close = nearest(name, names, similarity=0.5)
    if not close and len(names) > 12:
        return f"none of its {len(names)} names is like it"
    return f"{'nearest' if close else 'there is'}: {', '.join(close or names) or 'nothing'}"


def _from_import(name: str, num_classes: int, in_channels: int) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f"cannot read the model {name!r}: write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module may raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise InputError(
                f"model {name!r}: importing {module_name} fails: {one_line(error)}"
            ) from error
        remedy = "install it, or put its folder on PYTHONPATH"
        if module_name.endswith(".py"):
            remedy = f"give the module's name, {module_name.removesuffix('.py')}:{function_name}"
        raise InputError(f"model {name!r}: no module {missing!r}; {remedy}") from None
    if not hasattr(module, function_name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(
            f"model {name!r}: {module_name} has no function {function_name!r}; "
            f"{_nearest(function_name, public)}"
        )
    function = getattr(module, function_name)
    if isinstance(function, nn.Module) or not callable(function):
        raise InputError(
            f"model {name!r}: {function_name} is of type {type(function).__name__}: name a "
            "function that takes num_classes and returns a torch nn.Module"
        )
    arguments = _own_arguments(name, function, num_classes, in_channels)
    try:
        model = function(**arguments)
    except Exception as error:  # whatever a user's code may raise
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise InputError(
            f"model {name!r}: {function_name}({given}) fails: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model {name!r}: the function returned {type(model).__name__}, not a torch nn.Module"
        )
    return model


def _own_arguments(
    name: str, function: Callable[..., object], num_classes: int, in_channels: int
) -> dict[str, int]:
    """Of num_classes and in_channels those that the signature names, and num_classes for a function
    with **arguments of any name, which a library passes on to its models; a function that needs
    more is refused. Whether the model heeds num_classes, its logits show."""
    arguments = {"num_classes": num_classes, "in_channels": in_channels}
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        signature = inspect.Signature()
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named.add("num_classes")
    arguments = {key: value for key, value in arguments.items() if key in named}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"model {name!r}: the function gets {' and '.join(arguments) or 'nothing'} alone (of "
            f"num_classes and in_channels what it takes by name): {error}"
        ) from None
    return arguments
