"""The settings of a re-identification run: `TrainConfig`'s, with other defaults, and its own.

Defaults are the paper's for Market-1501 (`recipe` "paper"). Where the paper is silent, they are
those of the authors' code: weight decay 4e-5, images of 224x224. What that code does beside the
paper is optional: label_smoothing 0.1, ema 0.9999, kl_sum. Recipe "strong" is the bag of tricks of
Luo et al., "Bag of Tricks and A Strong Baseline for Deep Person Re-identification", CVPRW 2019,
with mutual learning on top; `kl_weight` 0 leaves that out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastdml.data.reid_layouts import checked_pattern
from fastdml.errors import InputError
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.fields import COUNT, FRACTION, NOT_NEGATIVE, Limit, documented

if TYPE_CHECKING:
    pass


@documented
@dataclass(frozen=True, kw_only=True)
class ReidConfig(TrainConfig):
    """The settings of a re-identification run: those of `TrainConfig`, which see, and these.

    The defaults are the paper's for Market-1501; `preset` and `fastdml train market1501` take those
    of `recipe`.
    """

    # --- data ---
    data: str = "market1501"
    """Data set: market1501, dukemtmc, msmt17, veri or, for your own, reid_folder."""
    root: str = "data"
    """Folder that holds the data set; with `standin` the one that holds CIFAR-100."""
    download: bool = False
    """Fetch CIFAR-100 for the stand-in; Market-1501 itself is not free to be passed on."""
    validation: float = 0.0
    """Training identities held out to choose the best weights: a share, or from 1 on a number."""
    batch_size: int = 16
    """Images a step. Paper: 16; strong: 64, 16 identities with 4 images each."""
    pad: int = 0
    """Pixels of black border that the random crop moves in; 0 means no crop. Strong: 10."""
    flip: bool = True
    """Mirror half of the training images, at random. Strong: yes."""

    # --- peers and loss ---
    peers: tuple[str, ...] = ("mobilenet", "mobilenet")
    """Models to train together; a name given twice is two peers with different initial weights."""
    pretrained: bool = False
    """Begin with weights trained on ImageNet (resnet50 and timm: models). Strong: yes."""
    label_smoothing: float = 0.0
    """Share of the label's probability spread over all classes. Paper: 0; its code, strong: 0.1."""

    # --- optimizer ---
    optimizer: Literal["sgd", "adam", "adamw", "apex_sgd", "apex_adam", "apex_lamb"] = "adam"
    """One optimizer over all peers; apex_* are NVIDIA Apex's fused ones. Paper, strong: adam."""
    lr: float = 2e-4
    """Learning rate at the start. Paper: 2e-4; strong: 3.5e-4."""
    momentum: float = 0.5
    """Momentum of sgd and apex_sgd; the first beta of the others. Paper: 0.5; strong: 0.9."""
    weight_decay: float = 4e-5
    """L2 penalty on all parameters. Not in the paper; its code: 4e-5; strong: 5e-4."""
    epochs: int = 0
    """Passes over the training images. Strong: 120."""
    iterations: int = 100_000
    """Steps of the run, in place of epochs, which is 0 then. Paper: 100,000; strong: 0."""
    lr_drop_every: int = 0
    """Epochs between two drops (step schedule); 0: none. Paper: none."""
    lr_drops: tuple[int, ...] = ()
    """Epochs after which the rate drops, in place of lr_drop_every. Strong: 40 70."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0, fractions allowed. Paper: 0; strong: 10."""
    ema: float = 0.0
    """Decay of averaged weights, which are then what is evaluated and saved; 0: none. Paper: 0;
    its code: 0.9999."""

    # --- the run ---
    eval_every: int = 10
    """Epochs between two evaluations on query and gallery; the last epoch always has one."""

    # --- re-identification ---
    recipe: Literal["paper", "strong"] = "paper"
    """Defaults of all other settings: the paper's, or the strong baseline's (Luo et al. 2019)."""
    standin: bool = False
    """Train on pictures of CIFAR-100 in Market-1501's layout, made below `root`; small, strong."""
    pattern: str = ""
    """How files of reid_folder are named: a regular expression with groups id and camera, searched
    for in the path below train, query or gallery. Empty: as in Market-1501, 0002_c1..."""
    bad_files: Literal["error", "skip"] = "error"
    """Images that cannot be decoded: end the run with their names, or go on without them."""
    height: int = 224
    """Pixels that images are resized to. Paper's code: 224; strong: 256."""
    width: int = 224
    """Pixels that images are resized to. Paper's code: 224; strong: 128."""
    images_per_id: int = 0
    """Images of each identity in a batch; 0: batches at random. Paper: 0; strong: 4."""
    erasing: float = 0.0
    """Probability that an image loses a rectangle (random erasing). Paper: 0; strong: 0.5."""
    flip_test: bool = True
    """Average the features of an image and of its mirror image, in evaluation."""
    pooling: Literal["avg", "gem"] = "avg"
    """Of the last feature map: average, or generalised mean. Paper, strong: avg."""
    neck: bool = False
    """Normalise pooled features (BNNeck) before classification and retrieval. Strong: yes."""
    last_stride: Literal[1, 2] = 2
    """Stride of a ResNet's last stage. Paper: 2; strong: 1."""
    kl_sum: bool = False
    """Sum the KL terms over the other peers, as the authors' code does, in place of the mean."""
    triplet_weight: float = 0.0
    """Weight of the batch-hard triplet loss. Strong: 1."""
    margin: float | None = 0.3
    """Of the triplet loss; none: the soft margin, log(1 + exp(d)). Strong: 0.3."""
    center_weight: float = 0.0
    """Weight of the center loss. Strong: 0.0005."""
    circle_weight: float = 0.0
    """Weight of the circle loss."""
    distance_mutual_weight: float = 0.0
    """Weight of the mutual loss on the peers' matrices of distances within the batch."""

    mutual_weights: ClassVar[tuple[str, ...]] = ("kl_weight", "distance_mutual_weight")
    limits: ClassVar[dict[str, Limit]] = {
        **TrainConfig.limits,
        "groups": (lambda x: x == 1, "1 in re-identification"),  # distances compare all peers
        "height": COUNT,
        "width": COUNT,
        "images_per_id": NOT_NEGATIVE,
        "erasing": FRACTION,
        "triplet_weight": NOT_NEGATIVE,
        "margin": (lambda x: x is None or x >= 0, "0 or more, or none"),
        "center_weight": NOT_NEGATIVE,
        "circle_weight": NOT_NEGATIVE,
        "distance_mutual_weight": NOT_NEGATIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labelled or self.unlabelled:
            raise InputError(
                f"{'labelled' if self.labelled else 'unlabelled'} is for classification: "
                "re-identification needs the identity of every training image; leave it out"
            )
        if self.images_per_id and self.batch_size % self.images_per_id:
            raise InputError(
                f"batch_size ({self.batch_size}) must be a multiple of images_per_id "
                f"({self.images_per_id})"
            )
        needing = [name for name in METRIC_WEIGHTS if getattr(self, name)]
        if needing and self.accumulate > 1:
            raise InputError(
                f"accumulate above 1 does not go with {needing[0]}, a loss between all images of "
                "a batch: set accumulate to 1, or the weight to 0"
            )
        if self.triplet_weight and self.images_per_id == 1:
            raise InputError(
                "triplet_weight needs two images of an identity in a batch: set images_per_id "
                "to 2 or more, or to 0 for random batches"
            )
        self._check_set()

    def _check_set(self) -> None:
        """Raises InputError for settings that the data set does not have."""
        if self.pattern and self.data != "reid_folder":
            raise InputError(
                f"pattern is for files named your own way: {self.data} has names of its own; "
                "leave pattern out, or train on reid_folder"
            )
        if self.pattern:
            checked_pattern(self.pattern)
        if self.standin and self.data in OTHERS:
            raise InputError(
                f"standin is in Market-1501's layout, not {self.data}'s: train on market1501"
            )
        if self.download and not self.standin:
            name = self.data if self.data in OTHERS else "Market-1501"
            raise InputError(
                f"{name} cannot be downloaded: ask its authors for it, unpack it and name "
                "the folder with root (or try standin)"
            )

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


OTHERS = ("dukemtmc", "msmt17", "veri", "reid_folder")  # sets beside market1501

METRIC_WEIGHTS = ("triplet_weight", "center_weight", "circle_weight", "distance_mutual_weight")

# What a recipe changes in the defaults, which are the paper's.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "strong": {
        "peers": ("resnet50", "resnet50"),
        "pretrained": True,
        "height": 256,
        "width": 128,
        "pad": 10,
        "erasing": 0.5,
        "batch_size": 64,
        "images_per_id": 4,
        "label_smoothing": 0.1,
        "neck": True,
        "last_stride": 1,
        "triplet_weight": 1.0,
        "center_weight": 5e-4,
        "lr": 3.5e-4,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "iterations": 0,
        "epochs": 120,
        "warmup_epochs": 10.0,
        "lr_drops": (40, 70),
    },
}

# What the stand-in changes in a recipe: small peers from scratch on small images, in minutes on a
# CPU. Of so short a training a triplet loss of weight 1 costs mAP: 8.3 % against 9.1 % without,
# after 30,000 images of one resnet20. With 0.2 and a soft margin it does not.
STANDIN: dict[str, Any] = {
    "peers": ("resnet20", "resnet20"),
    "pretrained": False,
    "height": 32,
    "width": 16,
    "pad": 2,
    "erasing": 0.0,
    "last_stride": 2,
    "lr": 5e-3,
    "iterations": 0,
    "epochs": 5,
    "warmup_epochs": 1.0,
    "schedule": "cosine",
    "lr_drops": (),
    "eval_every": 1,
}
STANDIN_STRONG = {"triplet_weight": 0.2, "margin": None}


# What a set changes in a recipe: vehicles are about as wide as high.
OF_SETS: dict[tuple[str, str], dict[str, Any]] = {("veri", "strong"): {"height": 256, "width": 256}}


def reid_preset(data: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that `chosen` settings (recipe, standin) leave to the others."""
    standin = chosen.get("standin") is True
    recipe = chosen.get("recipe", "strong" if standin else "paper")
    values = RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}
    values = {**values, **OF_SETS.get((data, str(recipe)), {})}
    if standin:
        values = {**values, **STANDIN, **(STANDIN_STRONG if recipe == "strong" else {})}
    return {"recipe": recipe, **values}
