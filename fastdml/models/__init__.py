"""Models by name, and heads for re-identification.

    resnet20, resnet32, ...   CIFAR ResNet, any depth 6n + 2
    wrn_28_10, wrn_16_4, ...  Wide ResNet, any depth 6n + 4 and width
    mobilenet, googlenet      their CIFAR forms
    package.module:function   your own, called with num_classes= and in_channels=, as far as its
                              signature names them; num_classes= also goes to **arguments
    timm:NAME                 any model of timm, with pretrained weights if asked
    NAME@SIZE                 any of these on images that it resizes to SIZE x SIZE itself, so that
                              peers may see one image at different sizes

All of the first three kinds take images of 8x8 and up with any number of channels, return logits
(N, C), and offer `forward_features`, `num_features` and `num_classes`. A model is a file of this
package, which registers itself by `register_model`; a file of yours may do the same, and once it
is imported its names are known as well.

With `head=ReidHead(...)` a name gives a `ReidModel`: the same backbones, mobilenet and googlenet in
their form for large images, resnet18, 34, 50, 101 and 152 as the ImageNet networks (timm's), and of
your own models and timm's those with a feature map (N, F, H, W) from `forward_features`.
"""

from fastdml.models.create import catalogue, create_model, model_names
from fastdml.models.registry import register_model
from fastdml.models.reid_head import ReidHead, ReidModel
from fastdml.models.timm_models import pretrained_normalisation

__all__ = [
    "ReidHead",
    "ReidModel",
    "catalogue",
    "create_model",
    "model_names",
    "pretrained_normalisation",
    "register_model",
]
