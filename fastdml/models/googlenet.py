"""GoogLeNet (Inception V1): Szegedy et al., "Going Deeper with Convolutions", 2014.

The nine Inception modules have the channels of that paper's table 1, 5x5 branches included. Batch
normalisation replaces local response normalisation and dropout; the auxiliary heads are off.

The form for large images, that of re-identification, has the paper's stem: 224x224 ends in a 7x7
map and 256x128 in 8x4, or twice that each way with `last_stride=1`, which lets the last pooling
keep the map. The CIFAR form's stem keeps its three convolutions and loses their downsampling (the
7x7 at stride 2 becomes a 3x3 at stride 1, the two poolings go), so a 32x32 image ends in 8x8.

At 100 classes and 32x32: 6,075,652 parameters, 1.56G multiply-adds an image. The mutual learning
paper prints 7.8M for its InceptionV1 and does not say how that is made up. It is not this network
with a head of 1000 classes (7.0M), nor with its two auxiliary heads (10.6M), nor with the 3x3 in
place of 5x5 that the TF-slim version used by its authors has (5.7M); ours is Szegedy's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdml.models.layers import Classifier, conv_bn_relu, init_weights
from fastdml.models.registry import register_model

# channels of each module: 1x1 | 1x1 -> 3x3 | 1x1 -> 5x5 | pool -> 1x1
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
    """Four branches side by side, joined over the channels."""

    def __init__(
        self, channels: int, one: int, to_three: int, three: int, to_five: int, five: int, pool: int
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn_relu(channels, one, 1),
                nn.Sequential(
                    conv_bn_relu(channels, to_three, 1), conv_bn_relu(to_three, three, 3)
                ),
                nn.Sequential(conv_bn_relu(channels, to_five, 1), conv_bn_relu(to_five, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv_bn_relu(channels, pool, 1)),
            ]
        )
        self.channels_out = one + three + five + pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


@register_model("googlenet", purpose="GoogLeNet, Inception V1", input="8x8 and up")
class GoogLeNet(Classifier):
    def __init__(
        self, num_classes: int, in_channels: int = 3, *, large: bool = False, last_stride: int = 2
    ) -> None:
        """large: the paper's stem; else the CIFAR form."""
        super().__init__(num_features=1024, num_classes=num_classes)
        layers: list[nn.Module]
        if large:
            layers = [
                conv_bn_relu(in_channels, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1),
                conv_bn_relu(64, 64, 1), conv_bn_relu(64, 192, 3), nn.MaxPool2d(3, 2, padding=1),
            ]  # fmt: skip
        else:
            layers = [
                conv_bn_relu(in_channels, 64, 3), conv_bn_relu(64, 64, 1), conv_bn_relu(64, 192, 3),
            ]  # fmt: skip
        channels = 192
        for i, stage in enumerate(STAGES):
            if i > 0:
                stride = last_stride if i == len(STAGES) - 1 else 2
                layers.append(nn.MaxPool2d(3, stride, padding=1))
            for widths in stage:
                module = Inception(channels, *widths)
                layers.append(module)
                channels = module.channels_out
        self.features = nn.Sequential(*layers)
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)
