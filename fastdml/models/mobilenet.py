"""MobileNet for CIFAR: Howard et al., "MobileNets", 2017, at width 1.

The layers and channels are the ImageNet network's. Its stem and its 64 -> 128 block, which halve
the map there, keep it here: a 32x32 image ends in a 4x4 map. The mutual learning paper does not
describe its CIFAR form; the accuracy it reports for one network alone, 73.65%, needs this one: with
only the stem at stride 1 (a 2x2 final map) reproductions reach 64.6%.

At 100 classes and 32x32: 3,309,476 parameters (the paper's 3.3M), 176M multiply-adds an image.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdml.models.layers import Classifier, conv_bn_relu, init_weights

# (channels out, stride) of each depthwise-separable block
BLOCKS = (
    (64, 1),
    (128, 1), (128, 1),
    (256, 2), (256, 1),
    (512, 2), *((512, 1),) * 5,
    (1024, 2), (1024, 1),
)  # fmt: skip


class MobileNetCifar(Classifier):
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(num_features=1024, num_classes=num_classes)
        channels = 32
        layers = [conv_bn_relu(in_channels, channels, 3)]
        for channels_out, stride in BLOCKS:
            layers.append(conv_bn_relu(channels, channels, 3, stride, groups=channels))
            layers.append(conv_bn_relu(channels, channels_out, 1))
            channels = channels_out
        self.features = nn.Sequential(*layers)
        init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)
