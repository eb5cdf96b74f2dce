"""Models of timm by name, with fresh weights or, if asked, with its pretrained ones.

Pretrained weights come from the local cache of the hub without touching the network, or are
downloaded into it. Whether the hub answers is asked once, before timm would retry for a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

from torch import nn

from fastdml.errors import InputError, require

# Options, first that fits, under which a network of one image size takes others as well.
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def create_timm_model(
    name: str,
    num_classes: int,
    in_channels: int,
    *,
    pretrained: bool,
    nearest: Callable[[str, Iterable[str]], str],
) -> nn.Module:
    """num_classes: 0 for a backbone alone, which then takes images of any size if it can."""
    timm = require("timm", "reid")
    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        raise InputError(f"timm has no model {name!r}; nearest: {near}")
    options = {"num_classes": num_classes, "in_chans": in_channels}
    if pretrained:
        options |= {"pretrained": True, "pretrained_cfg_overlay": _weights(timm, name)}
    config = timm.get_pretrained_cfg(name)
    one_size = num_classes == 0 and config is not None and config.fixed_input_size
    for size_options in ANY_SIZE if one_size else ({},):
        try:
            return timm.create_model(name, **options, **size_options)
        except TypeError:  # an option that this network does not have
            if not size_options:
                raise
        except OSError as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise InputError(f"timm cannot load the weights of {name!r}: {reason}") from None
    raise AssertionError("unreachable: the last options are none")


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
            f"timm has no pretrained weights for {name!r}: use pretrained=False, or a model of "
            "timm.list_models(pretrained=True)"
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
            f"cannot be reached ({type(error).__name__}): go online once, copy the cache here, or "
            "use pretrained=False"
        ) from None
    return {}
