"""Wide ResNet: Zagoruyko and Komodakis, "Wide Residual Networks", 2016.

WRN-D-W has D = 6n + 4 layers: a 3x3 stem of 16 channels and three stages of n pre-activation blocks
with 16W, 32W and 64W channels. A block whose shape changes has a 1x1 projection and feeds both
its branches from the activated input, as in the authors' code. Dropout is off, as in the mutual
learning paper's 36.5M-parameter WRN-28-10. For re-identification `last_stride=1` leaves the third
stage on the map of the second.

At 100 classes and 32x32: WRN-28-10 has 36,536,884 parameters and needs 5.2G multiply-adds an image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.models.layers import Classifier, conv3x3, init_weights
from fastdml.models.registry import neighbours, register_model

WIDEST = 999


class PreactBlock(nn.Module):
    """Identity shortcut: the shape stays."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)

    def residual(self, activated: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(F.relu(self.bn1(x), inplace=True))


class ProjectionBlock(PreactBlock):
    """1x1 projection as the shortcut: the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(channels_in, channels, stride)
        self.projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        return self.projection(activated) + self.residual(activated)


class WideResNet(Classifier):
    """`depth` is 6n + 4, `width` multiplies the channels."""

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        in_channels: int = 3,
        *,
        last_stride: int = 2,
    ) -> None:
        super().__init__(num_features=64 * width, num_classes=num_classes)
        n = (depth - 4) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.stage1 = _stage(16, 16 * width, n, stride=1)
        self.stage2 = _stage(16 * width, 32 * width, n, stride=2)
        self.stage3 = _stage(32 * width, 64 * width, n, stride=last_stride)
        self.bn = nn.BatchNorm2d(64 * width)
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.conv1(x))))
        return F.relu(self.bn(x), inplace=True)


@register_model(
    "wrn_{depth}_{width}",
    listed=("wrn_16_4", "wrn_28_10", "wrn_40_2"),
    purpose="Wide ResNets, any depth 6n + 4 and width; wrn_28_10 is the paper's",
    input="8x8 and up",
)
def wide_resnet(
    depth: int, width: int, num_classes: int, in_channels: int = 3, *, last_stride: int = 2
) -> WideResNet:
    """Raises InputError, which names the nearest, for a depth that is not 6n + 4."""
    if _is_depth(depth) and width <= WIDEST:
        return WideResNet(depth, width, num_classes, in_channels, last_stride=last_stride)
    near = " or ".join(
        f"wrn_{d}_{min(width, WIDEST)}"
        for d in ([depth] if _is_depth(depth) else neighbours(depth, _is_depth))
    )
    reason = f"a Wide ResNet has 6n + 4 layers and is up to {WIDEST} times as wide"
    raise InputError(f"no model {f'wrn_{depth}_{width}'!r}: {reason}; nearest: {near}")


def _is_depth(depth: int) -> bool:
    return depth >= 10 and depth % 6 == 4


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    same = stride == 1 and channels_in == channels  # the first stage at width 1
    first = PreactBlock if same else ProjectionBlock
    return nn.Sequential(
        first(channels_in, channels, stride),
        *(PreactBlock(channels, channels, stride=1) for _ in range(blocks - 1)),
    )
