"""Augmentation policies of torchvision, an image at a time: TrivialAugmentWide (Müller and Hutter,
"TrivialAugment", 2021) and RandAugment (Cubuk et al. 2020), with torchvision's defaults.

They draw from torch's global generator. `apply` seeds it for one image and puts back what it was,
so that the result depends on that seed alone: not on the process, nor on what came before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdml.data.philox import POLICY, draw
from fastdml.errors import InputError, require

POLICIES = {"trivial": "TrivialAugmentWide", "rand": "RandAugment"}  # our names to torchvision's


def check_policy(policy: str, channels: int) -> None:
    """Raises InputError for an unknown policy, or images that none takes; MissingExtra without
    torchvision."""
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r}: give one of {', '.join(POLICIES)}")
    if channels not in (1, 3):
        raise InputError(f"augment {policy} takes images of 1 or 3 channels, not of {channels}")
    _transform(policy)


def seeds(seed: int, epoch: int, samples: Tensor, repetitions: Tensor | None) -> Tensor:
    """A seed for each of `samples` (B,) int64 in this epoch, (B,) int64."""
    again = 0 if repetitions is None else repetitions
    return draw(seed, epoch, samples, POLICY, again)[0]


def apply(policy: str, image: np.ndarray, seed: int, white: int = 255) -> np.ndarray:
    """The augmented image, (H, W, ch) uint8 as `image`. white: the value of full brightness."""
    from PIL import Image

    pixels = image if white == 255 else (image * (255 / white)).round().astype(np.uint8)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's as well
        found = np.array(_transform(policy)(picture)).reshape(image.shape)
    return found if white == 255 else (found * (white / 255)).round().astype(np.uint8)


@cache
def _transform(policy: str) -> Callable[[Any], Any]:
    return getattr(require("torchvision.transforms.v2", "images"), POLICIES[policy])()
