"""Models of timm by name, with fresh weights or, if asked, with its pretrained ones.

Pretrained weights come from the local cache of the hub without touching the network, or are
downloaded into it. Whether the hub answers is asked once, before timm would retry for a minute.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdml.errors import InputError, require
from fastdml.eval_mode import evaluating
from fastdml.models.input_size import AtSize, split_size
from fastdml.models.resnet_cifar import IMAGENET_DEPTHS
from fastdml.names import fits, nearest

logger = logging.getLogger(__name__)

# With a re-identification head these names mean the ImageNet networks, which are timm's.
IMAGENET_RESNETS = tuple(f"resnet{depth}" for depth in IMAGENET_DEPTHS)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std, white being 1

# Options of timm that let a network built for one image size take others; the first that fits.
ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def create_timm_model(
    name: str,
    num_classes: int,
    in_channels: int,
    *,
    pretrained: bool,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """num_classes: 0 for a backbone alone, which then takes images of any size if it can.
    pretrained: begin with timm's weights, but for the classifier, which is always a new one: two
    peers of one name would else be equal where the classes are as many as timm's, or timm begins
    with zeros. image_size: (height, width) that a network of one size is built for, where it can
    be. Raises InputError for a name or weights that timm does not have, MissingExtra without
    timm."""
    timm = require("timm", "reid")
    config = _config(timm, name)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if pretrained:
        options |= {"pretrained": True, "pretrained_cfg_overlay": _weights(timm, name)}
    sizes: tuple[dict[str, Any], ...] = ({},)
    if config is not None and config.fixed_input_size:
        if num_classes == 0:
            sizes = ANY_SIZE
        elif image_size is not None and image_size != config.input_size[1:]:
            sizes = ({"img_size": image_size}, {})
    for size_options in sizes:
        try:
            model = timm.create_model(name, **options, **size_options)
        except TypeError:  # an option that this network does not have
            if not size_options:
                raise
        except OSError as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise InputError(f"timm cannot load the weights of {name!r}: {reason}") from None
        else:
            if pretrained and num_classes:
                model.reset_classifier(num_classes)
            return model
    raise AssertionError("unreachable: the last options are none")


def pretrained_classifier(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of timm with the classifier that its weights have, and what is known of the images
    that it was trained on, as `Cohort.record` says it.

    name: of timm, or NAME@SIZE, which resizes its images and therefore takes any size. Raises
    InputError and MissingExtra as `create_timm_model` does.
    """
    timm = require("timm", "reid")
    own, size = split_size(name)
    config = _config(timm, own)
    options: dict[str, Any] = {"pretrained_cfg_overlay": _weights(timm, own)}
    if size is not None and config.fixed_input_size:
        options["img_size"] = (size, size)
    try:
        model = timm.create_model(own, pretrained=True, **options)
    except (OSError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(f"timm cannot build {name!r} with its weights: {reason}") from None
    record = {
        "image_shape": None if size is not None else list(config.input_size),
        "mean": [255.0 * value for value in config.mean],
        "std": [255.0 * value for value in config.std],
        "classes": None,
    }
    if size is not None:
        model = AtSize(model, size, model.num_classes)
    return model, record


def pretrained_normalisation(
    names: Sequence[str], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), a number a channel in units where white is 1, that the images of pretrained
    peers are normalised by: those that the networks were trained with, or where these differ
    ImageNet's. Of images that have not three channels, their average for each. Logs which.

    names: of timm's networks, as `create_model` takes them. Raises InputError for one that timm
    does not have.
    """
    timm = require("timm", "reid")
    configs = [_config(timm, split_size(name)[0].removeprefix("timm:")) for name in names]
    found = {(tuple(config.mean), tuple(config.std)) for config in configs if config}
    mean, std = found.pop() if len(found) == 1 else IMAGENET
    how = "as ImageNet is, since the peers' own ways differ" if found else "as the peers' were"
    if channels != 3:
        mean, std = ((sum(numbers) / len(numbers),) * channels for numbers in (mean, std))
    logger.info(f"images are normalised {how}: mean {_short(mean)}, std {_short(std)}")
    return mean, std


def _short(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.3g}" for number in numbers)


def check_size(model: nn.Module, name: str, in_channels: int, image_size: tuple[int, int]) -> None:
    """Raises InputError for a network of timm's that cannot take images of this size, by having it
    try one. image_size: (height, width)."""
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, in_channels, *image_size))
    except Exception as error:  # networks say it in many ways
        config = _config(require("timm", "reid"), name)
        made_for = "{}x{}".format(*config.input_size[1:]) if config else "others"
        given, reason = "{}x{}".format(*image_size), " ".join(str(error).split())[:200]
        raise InputError(
            f"timm:{name} cannot take images of {given} ({reason}): it is made for {made_for}; "
            "choose a network that takes them, such as a ResNet"
        ) from None


def _config(timm: ModuleType, name: str) -> Any:
    """timm's description of a network, None where it has none; unknown names are refused."""
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}; {_near(name, timm.list_models())}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture, _, tag = name.partition(".")
        tags = [m.partition(".")[2] for m in timm.list_models(architecture, include_tags=True)]
        raise InputError(
            f"timm has no weights {tag!r} of {architecture}: there are {', '.join(tags)}"
        ) from None


def _near(name: str, names: Sequence[str]) -> str:
    """A few names that begin like `name`, or differ from it by a slip of the hand."""
    wanted = name.lower().replace("-", "_")
    longer = sorted((n for n in names if n.startswith(wanted)), key=len) if wanted else []
    near = dict.fromkeys([*longer[:3], *nearest(name, names, similarity=0.75)])
    return f"nearest: {', '.join(list(near)[:3])}" if near else "timm.list_models() lists them"


class TimmModel(NamedTuple):
    """What timm says of a network without building it."""

    name: str
    input: str  # the images that it is made for, such as 3x224x224
    any_size: bool
    pretrained: bool


def timm_models(pattern: str) -> list[TimmModel]:
    """timm's networks whose name has `pattern` in it, or fits it where it has a * or ?. Raises
    MissingExtra without timm."""
    timm = require("timm", "reid")
    found = []
    for name in timm.list_models():
        if not fits(name, pattern):
            continue
        config = timm.get_pretrained_cfg(name)
        size = "x".join(map(str, config.input_size)) if config else "?"
        fixed = config is not None and bool(config.fixed_input_size)
        found.append(TimmModel(name, size, not fixed, timm.is_model_pretrained(name)))
    return found


def keep_last_stage(model: nn.Module) -> None:
    """last_stride=1 for a ResNet of timm, whose last stage then keeps the map; others stay."""
    timm = require("timm", "reid")
    if not isinstance(model, timm.models.resnet.ResNet):
        return
    block = model.layer4[0]
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
        elif name == "aa" or isinstance(module, nn.AvgPool2d):  # resamples by 2, or did
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, nn.Identity())


def _weights(timm: ModuleType, name: str) -> dict[str, str]:
    """Where timm finds the weights: a file of the cache, or nothing where it shall download."""
    hub = require("huggingface_hub", "reid")
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise InputError(
            f"timm has no pretrained weights for {name!r}: set pretrained to false, or name "
            "one that has (timm.list_models(pretrained=True) lists them)"
        )
    if config.hf_hub_id is None:
        return {}
    cache, endpoint = hub.constants.HF_HUB_CACHE, hub.constants.ENDPOINT
    repo, _, revision = config.hf_hub_id.partition("@")
    for file in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        path = file and hub.try_to_load_from_cache(repo, file, cache, revision or None)
        if isinstance(path, str):
            return {"file": path}
    try:
        hub.get_session().head(endpoint, timeout=10)
    except Exception as error:  # whatever the installed HTTP client raises
        raise InputError(
            f"the pretrained weights of timm:{name} ({repo}) are not in {cache}, and {endpoint} "
            f"cannot be reached ({type(error).__name__}): go online once, or copy the cache "
            "here; or, for peers, set pretrained to false"
        ) from None
    return {}
