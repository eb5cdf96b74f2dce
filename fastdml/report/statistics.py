"""What predictions say of the peers: intervals, accuracy by class, confusion, calibration.

All in float64, from the arrays of `Predictions`; rules as in `metrics.classification`: an image
without probabilities counts as wrong, and turns calibration error and NLL into NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastdml.report.predictions import Predictions

Z95 = 1.959963984540054  # of the normal distribution, two-sided
BINS = 15


class Interval(NamedTuple):
    low: float
    high: float


def binomial_interval(fraction: float, n: float) -> Interval:
    """The 95 % Wilson score interval of a share, observed as `fraction` of n independent images:
    the shares that n other images of the same kind could plausibly have come from."""
    if n <= 0 or not 0 <= fraction <= 1:
        return Interval(math.nan, math.nan)
    z2, n = Z95 * Z95, float(n)
    middle = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(fraction * (1 - fraction) / n + z2 / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def paired_interval(a: np.ndarray, b: np.ndarray) -> Interval:
    """The 95 % interval of mean(a) - mean(b), shares right (N,) on the same images: narrower than
    that of two sets of images, since an image hard for one is mostly hard for the other."""
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n = len(gap)
    if n < 2:
        return Interval(math.nan, math.nan)
    half = Z95 * float(gap.std(ddof=1)) / math.sqrt(n)
    return Interval(float(gap.mean()) - half, float(gap.mean()) + half)


def right(found: Predictions) -> np.ndarray:
    """(K + 1, N) bool: whether each peer and the ensemble name the label."""
    return found.top == found.label


def class_counts(found: Predictions) -> np.ndarray:
    """(C,) images of each class."""
    return np.bincount(found.label, minlength=found.num_classes)


def class_accuracy(found: Predictions) -> np.ndarray:
    """(K + 1, C) float64: the share of each class's images that are right; NaN for no images."""
    count = class_counts(found).astype(np.float64)
    count[count == 0] = np.nan
    hits = [np.bincount(found.label[row], minlength=found.num_classes) for row in right(found)]
    return np.stack(hits) / count


def confusion(found: Predictions, row: int = -1) -> np.ndarray:
    """(C, C) int64: images of class i that are called j, by peer `row`, by default the ensemble.
    Images without probabilities are in no column."""
    C = found.num_classes
    said = found.top[row]
    known = said >= 0
    flat = found.label[known].astype(np.int64) * C + said[known]
    return np.bincount(flat, minlength=C * C).reshape(C, C)


class Confused(NamedTuple):
    true: int
    said: int
    images: int
    share: float  # of the images of the true class


def most_confused(found: Predictions, count: int) -> list[Confused]:
    """The pairs of classes that the ensemble takes for each other most often, at most `count`."""
    errors = found.top[-1] != found.label
    errors &= found.top[-1] >= 0
    pairs = np.stack([found.label[errors], found.top[-1][errors]], axis=1)
    unique, times = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-times, kind="stable")[:count]
    of_class = class_counts(found)
    return [
        Confused(int(i), int(j), int(n), float(n / of_class[i]))
        for (i, j), n in zip(unique[order], times[order], strict=True)
    ]


class Bin(NamedTuple):
    images: int
    confidence: float  # mean over the images in it; NaN where there are none
    accuracy: float


class Calibration(NamedTuple):
    bins: list[Bin]  # the m-th holds confidences in ((m - 1) / 15, m / 15]
    ece: float
    nll: float


def calibration(found: Predictions, row: int) -> Calibration:
    """Of peer `row`, or of the ensemble, the last."""
    confidence = found.confidence[row].astype(np.float64)
    hit = right(found)[row] & np.isfinite(confidence)
    finite = np.isfinite(confidence)
    # The product in float32, as scores are made: an image on the edge of a bin stays in it.
    place = np.ceil(found.confidence[row] * np.float32(BINS)) - 1
    place = np.where(finite, place, -1).clip(-1, BINS - 1)
    place = np.where(finite, place.clip(0), -1).astype(int)
    bins, gap = [], 0.0
    for m in range(BINS):
        inside = place == m
        count = int(inside.sum())
        if count:
            mean, share = float(confidence[inside].mean()), float(hit[inside].mean())
            gap += count * abs(mean - share)
        bins.append(Bin(count, mean if count else math.nan, share if count else math.nan))
    n = len(confidence)
    ece = gap / n if finite.all() else math.nan
    return Calibration(bins, ece, float(-found.label_log[row].astype(np.float64).mean()))
