"""ResNet for CIFAR: He et al., "Deep Residual Learning", 2015, section 4.2.

6n + 2 layers: a 3x3 stem, three stages of n basic blocks with 16, 32 and 64 channels on maps of
the input's size, a half and a quarter of it.

Shortcuts are the parameter-free ones (option A: every other pixel, new channels filled with zeros).
Section 4.2 uses them for every CIFAR network, and so do the reproductions of mutual learning that
reach the paper's ResNet-32; the 1x1 projections (option B) of many distillation benchmarks add
2,752 parameters. Both round to the paper's 0.5M.

For re-identification `last_stride=1` leaves the third stage on the map of the second.

At 100 classes and 32x32: ResNet-32 has 470,004 parameters and needs 69M multiply-adds an image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.models.layers import Classifier, conv3x3, init_weights
from fastdml.models.registry import neighbours, register_model


class Shortcut(nn.Module):
    """Option A: (N, ch, H, W) -> (N, 2 ch, H/stride, W/stride) without parameters."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if channels == channels_in else Shortcut(stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


# Depths that everybody reads as the ImageNet network, 50 and 152 of them 6n + 2 as well.
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)


class ResNetCifar(Classifier):
    """`depth` counts the layers with weights: 6n + 2."""

    def __init__(
        self, depth: int, num_classes: int, in_channels: int = 3, *, last_stride: int = 2
    ) -> None:
        super().__init__(num_features=64, num_classes=num_classes)
        n = (depth - 2) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, n, stride=1)
        self.stage2 = _stage(16, 32, n, stride=2)
        self.stage3 = _stage(32, 64, n, stride=last_stride)
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.stage3(self.stage2(self.stage1(x)))


@register_model(
    "resnet{depth}",
    listed=("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    purpose="CIFAR's small ResNets, any depth 6n + 2; resnet32 is the paper's",
    input="8x8 and up",
)
def resnet(
    depth: int, num_classes: int, in_channels: int = 3, *, last_stride: int = 2
) -> ResNetCifar:
    """Raises InputError, which names the nearest, for a depth that is not 6n + 2."""
    if _is_depth(depth):
        return ResNetCifar(depth, num_classes, in_channels, last_stride=last_stride)
    near = " or ".join(f"resnet{d}" for d in neighbours(depth, _is_depth))
    reason = (
        "that name means the ImageNet network"
        if depth in IMAGENET_DEPTHS
        else "a CIFAR ResNet has 6n + 2 layers"
    )
    name = f"resnet{depth}"
    raise InputError(f"no model {name!r}: {reason}; nearest: {near} (ImageNet form: timm:{name})")


def _is_depth(depth: int) -> bool:
    return depth >= 8 and depth % 6 == 2 and depth not in IMAGENET_DEPTHS


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(channels_in, channels, stride),
        *(BasicBlock(channels, channels) for _ in range(blocks - 1)),
    )
