"""Where mutual learning helps: mutual against independent peers on the same images, group by group.

A gain has a 95 % interval over images, and the answers behind it: those that became right and those
that became wrong, the two counts of McNemar's test. Answers are one a peer and image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdml.analysis.plots import drawn
from fastdml.arguments import finite_number, listed, numbers, of_kind, shown, whole_number
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.predictions import READ, Predictions
from fastdml.report.statistics import Gain, comparable, gains, right

CONFIDENCES = 10  # bins


@dataclass(frozen=True)
class Gains(Result):
    """Arrays have a value a group; a group without images has NaN shares."""

    by: str  # what the groups are of
    groups: tuple[str, ...]
    images: np.ndarray
    before: np.ndarray  # share of the answers that are right
    after: np.ndarray
    low: np.ndarray  # of the 95 % interval of after - before
    high: np.ndarray
    gained: np.ndarray  # answers that became right
    lost: np.ndarray  # answers that became wrong

    @property
    def gain(self) -> np.ndarray:
        return self.after - self.before


def gains_by_group(
    before: Any, after: Any, group: Any, names: Sequence[str], *, by: str = "group"
) -> Gains:
    """before, after: (K, N) bool, which of K peers' answers to N images are right. group: (N,), the
    index among `names` of each image's group, or (K, N) where that is another for each peer; -1:
    none. Raises InputError for shapes that do not fit."""
    was, now, group = (
        numbers(name, values)
        for name, values in (("before", before), ("after", after), ("group", group))
    )
    names = listed("names", names, "names, one a group")
    if was.ndim != 2 or was.shape != now.shape or group.shape not in (was.shape, was.shape[1:]):
        raise InputError(
            f"before and after must be (K, N) and group (N,) or (K, N), not {list(was.shape)}, "
            f"{list(now.shape)} and {list(group.shape)}"
        )
    return _gains(by, names, gains(was.astype(bool), now.astype(bool), group, len(names)))


def gains_by_class(alone: Predictions, mutual: Predictions) -> Gains:
    """By the images' class. Raises InputError, as all below, where the two are not of the same
    images and peers."""
    was, now = _answers(alone, mutual)
    names = [mutual.class_name(c) for c in range(mutual.num_classes)]
    return gains_by_group(was, now, mutual.label, names, by="class")


def gains_by_confidence(alone: Predictions, mutual: Predictions, bins: int = CONFIDENCES) -> Gains:
    """By how sure independent peers are of the image, in bins of equal width. A peer's answers are
    grouped by the mean confidence of the *other* independent peers: grouped by its own, the images
    on which it was unsure by chance would gain from any change at all, and those on which it was
    sure by chance would lose. One peer has no others, and its own confidence must do."""
    was, now = _answers(alone, mutual)
    bins = whole_number("bins", bins, 1)
    K = len(was)
    own = alone.confidence[:K].astype(np.float64)
    sure = own if K == 1 else (own.sum(axis=0) - own) / (K - 1)
    finite = np.isfinite(sure)
    group = np.where(finite, np.ceil(np.where(finite, sure, 0) * bins) - 1, -1)
    group = np.where(finite, group.clip(0, bins - 1), -1).astype(int)
    names = [f"{100 * m / bins:.4g}–{100 * (m + 1) / bins:.4g} %" for m in range(bins)]
    return gains_by_group(was, now, group, names, by="confidence")


def gains_by_noise(alone: Predictions, mutual: Predictions, noisy: Any) -> Gains:
    """By whether a label is right. noisy: (N,) bool, the images whose label is known to be wrong;
    an answer is right where it is the label, of these too."""
    was, now = _answers(alone, mutual)
    mask = numbers("noisy", noisy)
    if mask.dtype != bool or mask.shape != mutual.label.shape:
        raise InputError(
            f"noisy must be {len(mutual.label)} values of true and false, one an image, not "
            f"{list(mask.shape)} of {mask.dtype}"
        )
    names = ("right label", "wrong label")
    return gains_by_group(was, now, mask.astype(int), names, by="label")


def gains_by_noise_level(runs: Mapping[float, tuple[Predictions, Predictions]]) -> Gains:
    """By the share of wrong labels that runs were trained with. runs: for each share the
    predictions of its independent and of its mutual peers, of the same images."""
    if not isinstance(runs, Mapping) or not runs:
        raise InputError(f"runs must be a dict of shares and predictions, not {shown(runs)}")
    levels = sorted((finite_number("each share of wrong labels", key), key) for key in runs)
    found = []
    for _, key in levels:
        pair = listed("each of runs", runs[key], "two predictions: independent and mutual")
        if len(pair) != 2:
            raise InputError(f"each of runs must be two predictions, not {len(pair)}")
        was, now = _answers(*pair)
        found += gains(was, now, np.zeros(was.shape[1], int), 1)
    names = [f"{100 * level:g} %" for level, _ in levels]
    return _gains("wrong labels in training", names, found)


def plot_gains(found: Gains, where: Any) -> Any:
    """The gain of each group in points, with its interval. where: as of `drawn`."""
    of_kind("found", found, Gains, "gains_by_...")

    def draw(axes: Any) -> None:
        there = np.flatnonzero(found.images)
        gain = 100 * found.gain[there]
        low, high = 100 * found.low[there], 100 * found.high[there]
        places = np.arange(len(there))
        axes.errorbar(
            gain, places, xerr=[gain - low, high - gain], fmt="o", color="#0072B2", elinewidth=0.8
        )
        axes.axvline(0, color="black", linewidth=0.8)
        step = max(1, -(-len(there) // 40))  # as many names as can be read
        names = [f"{found.groups[m]} ({found.images[m]:,})" for m in there[::step]]
        axes.set_yticks(places[::step], names)
        axes.invert_yaxis()
        axes.set(xlabel="gain (points)", ylabel=f"{found.by} (images)")

    rows = min(int((found.images > 0).sum()), 40)
    return drawn(where, draw, height=0.8 + 0.13 * rows)


def _answers(alone: Predictions, mutual: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) bool of each: which answers are right."""
    for name, value in (("alone", alone), ("mutual", mutual)):
        of_kind(name, value, Predictions, READ)
    if not comparable(alone, mutual):
        raise InputError(
            "these predictions cannot be compared: they must be of the same images in the same "
            "order, by as many peers, and both of the last or both of the best weights"
        )
    return right(alone)[:-1], right(mutual)[:-1]


def _gains(by: str, names: Sequence[str], found: Sequence[Gain]) -> Gains:
    return Gains(
        by=by,
        groups=tuple(names),
        images=np.array([one.images for one in found]),
        before=np.array([one.before for one in found]),
        after=np.array([one.after for one in found]),
        low=np.array([one.interval.low for one in found]),
        high=np.array([one.interval.high for one in found]),
        gained=np.array([one.gained for one in found]),
        lost=np.array([one.lost for one in found]),
    )
