"""Re-identification: a head on a backbone's last feature map, after Luo et al., "Bag of Tricks and
a Strong Baseline for Deep Person Re-identification", 2019 (BoT).

    map (N, F, H, W) -> pooling -> features (N, F) -> BNNeck -> classifier without bias -> logits

Metric losses take the features before the BNNeck, retrieval takes those after it. Without a neck
the classifier has a bias, and both take the pooled features: the mutual learning paper's "last
pooling layer". Pooling is in float32 at least, so that distances between features are not rounded
to half precision. Beside its backbone a head costs F numbers a row and 4F + FC weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.models.layers import Classifier

POOLINGS = ("avg", "gem")
PROBES = ((64, 64), (256, 128), (224, 224))  # image sizes; some backbones accept few


@dataclass(frozen=True)
class ReidHead:
    """The settings of a head. The defaults are BoT's; ReidHead(neck=False, last_stride=2) is the
    mutual learning paper's.

    pooling: "avg", or "gem": the generalised mean (Radenović et al. 2018), its exponent learnt.
    neck: batch normalisation between features and classifier, its bias kept at 0 (BNNeck).
    last_stride: 1 leaves the map at twice the size in the last stage: every model that is called by
        a name of ours, and the ResNets of timm. Others have no such stage and stay as they are.

    Raises InputError for other values.
    """

    pooling: str = "avg"
    neck: bool = True
    last_stride: int = 1

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling must be avg or gem, not {self.pooling!r}")
        if not isinstance(self.neck, bool):
            raise InputError(f"neck must be True or False, not {self.neck!r}")
        if self.last_stride not in (1, 2):
            raise InputError(f"last_stride must be 1 or 2, not {self.last_stride!r}")


class AveragePool(nn.Module):
    """(N, F, H, W) -> (N, F), float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


class GeMPool(nn.Module):
    """Generalised mean, (mean x**p)**(1/p) over the map, one learnt p for all channels: Radenović,
    Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018."""

    EPS = 1e-6  # smaller values count as this much

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=self.EPS)
        return x.pow(self.p).mean((2, 3)).pow(1 / self.p)


class ReidModel(nn.Module):
    """`backbone` with a head. `forward` gives logits, so a cohort treats it as any other peer.

    backbone: `forward_features(x) -> (N, F, H, W)` and `num_features` F. Of timm's models, maps
    with the channels last and tokens (but for those of no place in the image) are taken as well.
    Raises InputError for a backbone without such a map.
    """

    def __init__(
        self,
        backbone: Any,  # an nn.Module
        num_classes: int,
        head: ReidHead,
        *,
        name: str = "",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.name = name or type(backbone).__name__
        self.layout = "map"
        if isinstance(backbone, Classifier):
            backbone.head = nn.Identity()
        else:
            self.layout = _probed(backbone, self.name, in_channels)
        self.backbone: Any = backbone
        self.num_features, self.num_classes = int(backbone.num_features), num_classes
        self.pool: nn.Module = GeMPool() if head.pooling == "gem" else AveragePool()
        self.neck: nn.Module = nn.Identity()
        self.classifier = nn.Linear(self.num_features, num_classes, bias=not head.neck)
        if head.neck:
            self.neck = nn.BatchNorm1d(self.num_features)
            self.neck.bias.requires_grad_(False)
            nn.init.normal_(self.classifier.weight, std=0.001)
        else:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W) -> logits (N, C)."""
        return self.classifier(self.neck(self.features(x)))

    def logits_and_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and, for metric losses, the pooled features (N, F) from before the neck."""
        features = self.features(x)
        return self.classifier(self.neck(features)), features

    def embed(self, x: Tensor) -> Tensor:
        """The features (N, F) that retrieval compares: after the BNNeck where there is one."""
        return self.neck(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        m = self.backbone.forward_features(x)
        if self.layout == "channels last":
            m = m.permute(0, 3, 1, 2)
        elif self.layout == "tokens":
            m = m[:, self.backbone.num_prefix_tokens :].transpose(1, 2).unsqueeze(3)
        if m.dim() != 4:
            raise _no_map(self.name, self.num_features, m)
        return self.pool(m)


def _probed(backbone: Any, name: str, in_channels: int) -> str:
    """The layout of an unknown backbone's map, found by one image. Layers that the map does not
    depend on, such as a classifier of its own, are dropped: without a gradient they would be dead
    weight in optimizers and checkpoints."""
    if not callable(getattr(backbone, "forward_features", None)) or not hasattr(
        backbone, "num_features"
    ):
        raise InputError(
            f"model {name!r} is a backbone without a feature map to pool: it needs "
            "forward_features(images) -> (N, F, H, W) and num_features = F"
        )
    m = _map_of_one_image(backbone, in_channels)
    if m is None:
        return "map"  # `forward` will look at it
    F = backbone.num_features
    if m.dim() == 4 and m.shape[1] == F:
        layout = "map"
    elif m.dim() == 4 and m.shape[3] == F:
        layout = "channels last"
    elif m.dim() == 3 and m.shape[2] == F and hasattr(backbone, "num_prefix_tokens"):
        layout = "tokens"
    else:
        raise _no_map(name, F, m)
    weights = [w for w in backbone.parameters() if w.requires_grad]
    if m.requires_grad:
        grads = torch.autograd.grad(m.sum(), weights, allow_unused=True)
        unused = {id(w) for w, grad in zip(weights, grads, strict=True) if grad is None}
        for child_name, child in list(backbone.named_children()):
            own = {id(w) for w in child.parameters()}
            if own and own <= unused:
                setattr(backbone, child_name, nn.Identity())
    return layout


def _map_of_one_image(backbone: Any, in_channels: int) -> Tensor | None:
    """In evaluation mode: leaves statistics and random generators alone."""
    with evaluating(backbone), torch.enable_grad():
        for size in PROBES:
            try:
                return backbone.forward_features(torch.zeros(1, in_channels, *size))
            except (AssertionError, RuntimeError):  # not its size
                continue
    return None


def _no_map(name: str, num_features: int, found: Tensor) -> InputError:
    return InputError(
        f"model {name!r} is a backbone without a feature map to pool: forward_features must return "
        f"(N, {num_features}, H, W), and returned {tuple(found.shape)}"
    )
