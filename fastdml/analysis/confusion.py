"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdml.analysis.plots import drawn, heat_map
from fastdml.arguments import listed, numbers, of_kind, whole_number
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.statistics import Confused, confused_pairs, count_pairs


@dataclass(frozen=True)
class ConfusionMatrix(Result):
    """Rows are true classes, columns what is said; an image without an answer is in no column."""

    classes: tuple[str, ...]  # C names
    counts: np.ndarray  # (C, C) images
    shares: np.ndarray  # (C, C) of the images of the true class; NaN where there are none
    most_confused: tuple[Confused, ...]  # true class, said, images, share: the most images first


def confusion_matrix(
    labels: Any,
    predicted: Any,
    num_classes: int,
    *,
    classes: Sequence[str] = (),
    pairs: int = 30,
) -> ConfusionMatrix:
    """The confusion matrix of N images. labels, predicted: (N,) class indices below `num_classes`;
    of predicted -1 is no answer. classes: names, by default the indices. pairs: how many of the
    most confused classes to list. Raises InputError for what does not fit."""
    label, said = numbers("labels", labels), numbers("predicted", predicted)
    C, pairs = whole_number("num_classes", num_classes, 1), whole_number("pairs", pairs, 0)
    classes = listed("classes", classes, "names, one a class")
    if label.ndim != 1 or label.shape != said.shape or (classes and len(classes) != C):
        raise InputError(
            f"labels and predicted must be (N,) and classes {C} names, not {list(label.shape)}, "
            f"{list(said.shape)} and {len(classes)}"
        )
    for name, values, low in (("labels", label, 0), ("predicted", said, -1)):
        if values.dtype.kind not in "iu" or (len(values) and not low <= values.min()):
            raise InputError(f"{name} must be whole numbers, {low} or more")
        if len(values) and values.max() >= C:
            raise InputError(f"{name} go to {values.max()}, but num_classes is {C}")
    counts = count_pairs(label, said, C)
    of_class = np.bincount(label, minlength=C)
    with np.errstate(invalid="ignore"):
        shares = counts / of_class[:, None]
    found = confused_pairs(counts, of_class, pairs)
    names = tuple(classes) or tuple(map(str, range(C)))
    return ConfusionMatrix(names, counts, shares, tuple(found))


def plot_confusion(found: ConfusionMatrix, where: Any) -> Any:
    """The shares as a heat map. where: as of `drawn`."""
    of_kind("found", found, ConfusionMatrix, "confusion_matrix")

    def draw(axes: Any) -> None:
        heat_map(axes, 100 * found.shares, found.classes, found.classes, "{:.0f}")
        axes.set(xlabel="said", ylabel="true class")
        axes.set_title("share of the images of a class (%)", loc="left")

    return drawn(where, draw, height=3.4)
