"""Pairs of networks on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastdml.reproduce.experiment import Experiment, Row
from fastdml.reproduce.scales import Scale
from fastdml.reproduce.table2 import Figures, notes, pair_rows

FIGURES: Figures = {
    ("wrn_28_10", "resnet32"): ((95.01, 92.47), (95.75, 93.18)),
    ("mobilenet", "resnet32"): ((93.59, 92.47), (94.24, 93.32)),
    ("resnet32", "resnet32"): ((92.47, 92.47), (92.68, 92.80)),
}


def rows(scale: Scale) -> Sequence[Row]:
    return pair_rows(scale, "cifar10", FIGURES)


EXPERIMENT = Experiment(
    "cifar10",
    "Top-1 accuracy of pairs of networks on CIFAR-10",
    "the results on CIFAR-10",
    rows,
    notes=partial(notes, data="CIFAR-10"),
)
