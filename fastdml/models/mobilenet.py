"""MobileNet: Howard et al., "MobileNets", 2017, at width 1.

The layers and channels are the ImageNet network's, whose stem and 64 -> 128 block halve the map; it
is the form for re-identification: 224x224 ends in a 7x7 map and 256x128 in 8x4, or twice that each
way with `last_stride=1`, which lets the 512 -> 1024 block keep the map.

The CIFAR form keeps the map in the stem and in the 64 -> 128 block: a 32x32 image ends in 4x4. The
mutual learning paper does not describe its CIFAR form; the accuracy it reports for one network
alone, 73.65%, needs this one: with only the stem at stride 1 (a 2x2 final map) reproductions reach
64.6%.

At 100 classes and 32x32: 3,309,476 parameters (the paper's 3.3M), 176M multiply-adds an image. At
1000 classes and 224x224: 4,231,976 parameters, 569M multiply-adds.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdml.models.layers import Classifier, conv_bn_relu, init_weights
from fastdml.models.registry import register_model

# (channels out, stride) of each depthwise-separable block of the ImageNet form
BLOCKS = (
    (64, 1),
    (128, 2), (128, 1),
    (256, 2), (256, 1),
    (512, 2), *((512, 1),) * 5,
    (1024, 2), (1024, 1),
)  # fmt: skip
KEPT_ON_CIFAR, LAST = 1, 11  # blocks of stride 2


@register_model("mobilenet", purpose="MobileNet at width 1", input="8x8 and up")
class MobileNet(Classifier):
    def __init__(
        self, num_classes: int, in_channels: int = 3, *, large: bool = False, last_stride: int = 2
    ) -> None:
        """large: the ImageNet form; else the CIFAR form."""
        super().__init__(num_features=1024, num_classes=num_classes)
        channels = 32
        layers = [conv_bn_relu(in_channels, channels, 3, 2 if large else 1)]
        for i, (channels_out, stride) in enumerate(BLOCKS):
            if i == KEPT_ON_CIFAR and not large:
                stride = 1
            elif i == LAST:
                stride = last_stride
            layers.append(conv_bn_relu(channels, channels, 3, stride, groups=channels))
            layers.append(conv_bn_relu(channels, channels_out, 1))
            channels = channels_out
        self.features = nn.Sequential(*layers)
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)
