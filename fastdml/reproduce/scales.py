"""How large a reproduction is: the paper's settings in full, or fewer images and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdml.arguments import shown
from fastdml.errors import InputError
from fastdml.names import advice

COSINE = "the learning rate falls as half a cosine in place of steps"
# Of all scales but the full one: runs write only what is read again,
BRIEF = {"tensorboard": False, "figures": ()}
# and where they are made for a CPU they repeat bit for bit.
REPEATABLE = {"deterministic": True, **BRIEF}

# Training images, and those of an evaluation: the test set, or query and gallery.
IMAGES = {
    "digits": (1442, 355),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "market1501": (12_936, 23_100),
}


@dataclass(frozen=True)
class Scale:
    """What a scale makes of an experiment."""

    name: str
    about: str  # one line
    seeds: int  # 0, 1, ...: so many unless the user says
    network: str  # of experiments whose rows name none
    cohort_sizes: tuple[int, ...]
    pair_independent: bool
    """Whether the pair of these networks also trains independently; else its baseline is the first
    two peers of the largest cohort, which begin with the same weights and see the same batches."""
    data: str | None = None  # in place of CIFAR
    settings: Mapping[str, Any] = field(default_factory=dict)  # over the experiment's own
    changes: tuple[str, ...] = ()  # what differs from the paper's settings; () in full alone

    @property
    def scaled_down(self) -> bool:
        return bool(self.changes)

    @property
    def images(self) -> int:
        """Training images, where a scale limits them; 0: all."""
        return self.settings.get("subset", 0)


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "full",
            "the paper's settings: 200 epochs of all images, 3 seeds",
            seeds=3,
            network="resnet32",
            cohort_sizes=(1, 2, 3, 4, 5, 6, 7, 8),
            pair_independent=True,
        ),
        Scale(
            "medium",
            "40 epochs of all images, 3 seeds: minutes a table on a GPU",
            seeds=3,
            network="resnet32",
            cohort_sizes=(1, 2, 4),
            pair_independent=True,
            settings={"epochs": 40, "schedule": "cosine", "eval_every": 10, **BRIEF},
            changes=("40 epochs in place of 200", COSINE),
        ),
        Scale(
            "small",
            "8 epochs of 20,000 images, 3 seeds: hours on a CPU",
            seeds=3,
            network="resnet14",
            cohort_sizes=(1, 2, 4),
            pair_independent=False,
            settings={
                "subset": 20_000,
                "epochs": 8,
                "schedule": "cosine",
                "eval_every": 4,
                **REPEATABLE,
            },
            changes=(
                "20,000 of 50,000 training images",
                "8 epochs in place of 200",
                COSINE,
            ),
        ),
        Scale(
            "smoke",
            "1 epoch of 512 images, 2 seeds: minutes, to see that everything works",
            seeds=2,
            network="resnet8",
            cohort_sizes=(1, 2),
            pair_independent=True,
            settings={"subset": 512, "epochs": 1, **REPEATABLE},
            changes=("512 of 50,000 training images", "1 epoch in place of 200"),
        ),
        Scale(
            "digits",
            "10 epochs of scikit-learn's digits, small networks, 5 seeds: minutes on a CPU",
            seeds=5,
            network="resnet8",
            cohort_sizes=(1, 2, 4),
            pair_independent=True,
            data="digits",
            settings={"epochs": 10, "schedule": "cosine", "eval_every": 5, **REPEATABLE},
            changes=(
                "scikit-learn's handwritten digits (8x8 pixels) in place of CIFAR",
                "smaller networks",
                "10 epochs in place of 200",
                COSINE,
            ),
        ),
    )
}


def find_scale(name: str) -> Scale:
    """Raises InputError for a scale that there is not, with the nearest."""
    if not isinstance(name, str):
        raise InputError(f"scale must be a name, such as 'small', not {shown(name)}")
    if name not in SCALES:
        raise InputError(f"unknown scale {name!r}; {advice(name, SCALES)}")
    return SCALES[name]
