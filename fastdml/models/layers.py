"""Shared by the models: the outline of a classifier, one convolution unit, one initialisation.

Every model is a stack of plain `nn.Module`s whose `forward` neither looks at the data nor keeps
state in Python: it can be captured in a CUDA graph, traced by `torch.fx` and exported as it is.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class Classifier(nn.Module):
    """Feature maps, global average pooling, one linear layer.

    A subclass gives `forward_features(x) -> (N, num_features, H', W')`, the last map before
    pooling. Pooling over whatever map comes out makes the model accept any input size, and
    re-identification takes `forward_features` and puts a head of its own on it.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W) -> logits (N, C)."""
        return self.head(self.forward_features(x).mean((2, 3)))


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


def conv_bn_relu(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (at stride 1), batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(
            channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def init_weights(model: nn.Module) -> None:
    """He initialisation of the convolutions, a head without bias at the start.

    The fan is k*k*out/groups, as in the reference code of ResNet and Wide ResNet. `kaiming_normal_`
    forgets the groups, which makes a depthwise layer of 1024 channels 32 times too small.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
