"""What predictions say of the peers: intervals, accuracy, gains, confusion, calibration.

All in float64, from the arrays of `Predictions`; rules as in `metrics.classification`: an image
without probabilities counts as wrong, and turns calibration error and NLL into NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastdml.arguments import numbers, whole_number
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.predictions import Predictions

Z95 = 1.959963984540054  # of the normal distribution, two-sided
BINS = 15
ROUNDING = 0.01  # that a probability may be above 1


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


def paired_interval(a: np.ndarray, b: np.ndarray, counts: np.ndarray | None = None) -> Interval:
    """The 95 % interval of mean(a) - mean(b), shares right (N,) on the same images: narrower than
    that of two sets of images, since an image hard for one is mostly hard for the other.

    counts: (N,), how many answers each image's share is of, where these are not as many for all;
    the means are then those over answers. Answers about one image are not independent, so that
    images, not answers, are what the interval draws anew."""
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n = len(gap)
    if n < 2:
        return Interval(math.nan, math.nan)
    if counts is None:
        mean, spread = float(gap.mean()), float(gap.std(ddof=1))
    else:
        weight = np.asarray(counts, np.float64) / np.mean(counts)
        mean = float((weight * gap).mean())
        spread = math.sqrt(float((weight**2 * (gap - mean) ** 2).sum()) / (n - 1))
    half = Z95 * spread / math.sqrt(n)
    return Interval(mean - half, mean + half)


def right(found: Predictions) -> np.ndarray:
    """(K + 1, N) bool: whether each peer and the ensemble name the label."""
    return found.top == found.label


def comparable(a: Predictions, b: Predictions) -> bool:
    """Whether they are of the same images, and both of the last or both of the best weights."""
    return (
        a.weights == b.weights and len(a.peers) == len(b.peers) and np.array_equal(a.label, b.label)
    )


class Gain(NamedTuple):
    """What answers about a group of images gained."""

    images: int
    before: float  # share of the answers that are right; NaN where there are none
    after: float
    interval: Interval  # of after - before, 95 %; NaN where no answer changed, or of one image
    gained: int  # answers that became right
    lost: int  # answers that became wrong


def gains(before: np.ndarray, after: np.ndarray, group: np.ndarray, count: int) -> list[Gain]:
    """By group of images, of `count`. before, after: (K, N) bool, which of K peers' answers are
    right. group: (N,) or, where an image is in a group of its own for each peer, (K, N), within
    0..count - 1; others are in none."""
    group = np.broadcast_to(group, before.shape)
    found = []
    for number in range(count):
        inside = group == number  # (K, N)
        answers = inside.sum(axis=0)
        images = np.flatnonzero(answers)
        answers = answers[images]
        inside, was, now = inside[:, images], before[:, images], after[:, images]
        shares_now, shares_was = ((inside & hit).sum(axis=0) / answers for hit in (now, was))
        total, changed = int(answers.sum()), bool((inside & (was != now)).any())
        unknown = Interval(math.nan, math.nan)
        found.append(
            Gain(
                len(images),
                int((inside & was).sum()) / total if total else math.nan,
                int((inside & now).sum()) / total if total else math.nan,
                paired_interval(shares_now, shares_was, answers) if changed else unknown,
                int((inside & now & ~was).sum()),
                int((inside & was & ~now).sum()),
            )
        )
    return found


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
    return count_pairs(found.label, found.top[row], found.num_classes)


def count_pairs(label: np.ndarray, said: np.ndarray, C: int) -> np.ndarray:
    """(C, C) int64: how many of the images (N,) of class i are called j; -1 is in no column."""
    known = said >= 0
    flat = label[known].astype(np.int64) * C + said[known]
    return np.bincount(flat, minlength=C * C).reshape(C, C)


class Confused(NamedTuple):
    true: int
    said: int
    images: int
    share: float  # of the images of the true class


def most_confused(found: Predictions, count: int) -> list[Confused]:
    """The pairs of classes that the ensemble takes for each other most often, at most `count`."""
    return confused_pairs(confusion(found), class_counts(found), count)


def confused_pairs(counts: np.ndarray, of_class: np.ndarray, count: int) -> list[Confused]:
    """The most frequent errors of a confusion matrix (C, C), at most `count`. of_class: (C,) images
    of each class."""
    true, said = np.nonzero(counts * ~np.eye(len(counts), dtype=bool))
    times = counts[true, said]
    order = np.argsort(-times, kind="stable")[:count]
    return [
        Confused(int(i), int(j), int(n), float(n / of_class[i]))
        for i, j, n in zip(true[order], said[order], times[order], strict=True)
    ]


class Bin(NamedTuple):
    images: int
    confidence: float  # mean over the images in it; NaN where there are none
    accuracy: float


@dataclass(frozen=True)
class Reliability(Result):
    """Accuracy over confidence, in B bins."""

    edges: np.ndarray  # (B + 1,): the m-th bin holds confidences in (edges[m], edges[m + 1]]
    images: np.ndarray  # (B,)
    confidence: np.ndarray  # (B,): mean; NaN where there are no images
    accuracy: np.ndarray  # (B,): share that is right
    ece: float  # the mean, over images, of |accuracy - confidence| of their bin
    mce: float  # the largest of any bin


def reliability(
    confidence: np.ndarray, right: np.ndarray, *, bins: int = BINS, equal_mass: bool = False
) -> Reliability:
    """How far confidence is from accuracy, of N images: expected and maximum calibration error
    (Guo et al., "On Calibration of Modern Neural Networks", 2017). confidence: (N,) floats in 0..1,
    of which NaN, no probabilities, counts as wrong, is in no bin and turns both errors into NaN.
    right: (N,) bool. equal_mass: bins of as equal numbers of images as equal confidences, which
    stay together, allow, in place of bins of equal width. Raises InputError for others, such as
    percent, and predicted classes in place of whether they are right."""
    bins = whole_number("bins", bins, 1)
    confidence, right = numbers("confidence", confidence), numbers("right", right)
    if confidence.ndim != 1 or confidence.dtype.kind != "f" or right.shape != confidence.shape:
        raise InputError(
            f"confidence must be (N,) floats and right (N,), not {list(confidence.shape)} of "
            f"{confidence.dtype} and {list(right.shape)}"
        )
    finite = np.isfinite(confidence)
    low, high = confidence[finite].min(initial=0.0), confidence[finite].max(initial=1.0)
    if low < 0 or high > 1 + ROUNDING:
        raise InputError(f"confidence must be within 0 to 1, not {low:g} to {high:g}")
    if right.dtype.kind != "b" and not np.isin(right, (0, 1)).all():
        raise InputError("right must be true or false of each image, such as predicted == labels")
    hit = right.astype(bool) & finite
    if equal_mass:
        ordered = np.sort(confidence[finite])
        ends = np.ceil(np.arange(1, bins + 1) * len(ordered) / bins).astype(int) - 1
        tops = ordered[ends] if len(ordered) else np.linspace(0, 1, bins + 1)[1:]
        edges = np.concatenate([[0.0], tops]).astype(np.float64)
        place = np.searchsorted(tops, confidence, side="left")
    else:
        edges = np.arange(bins + 1) / bins
        # The product in the dtype of the confidence, as scores are made of float32: an image on
        # the edge of a bin stays in it.
        place = np.ceil(confidence * confidence.dtype.type(bins)) - 1
    place = np.where(finite, np.clip(place, 0, bins - 1), -1).astype(int)
    confidence = confidence.astype(np.float64)
    images = np.zeros(bins, np.int64)
    means, shares = np.full(bins, math.nan), np.full(bins, math.nan)
    for m in range(bins):
        inside = place == m
        images[m] = inside.sum()
        if images[m]:
            means[m], shares[m] = confidence[inside].mean(), hit[inside].mean()
    some = images > 0
    gaps = np.abs(means - shares)[some]
    whole = finite.all() and len(finite) > 0
    total = sum((images[some] * gaps).tolist())
    ece = total / len(finite) if whole else math.nan
    mce = float(gaps.max()) if whole else math.nan
    return Reliability(edges, images, means, shares, ece, mce)


class Calibration(NamedTuple):
    bins: list[Bin]  # the m-th holds confidences in ((m - 1) / 15, m / 15]
    ece: float
    nll: float


def calibration(found: Predictions, row: int) -> Calibration:
    """Of peer `row`, or of the ensemble, the last."""
    of = reliability(found.confidence[row], right(found)[row])
    parts = zip(of.images.tolist(), of.confidence.tolist(), of.accuracy.tolist(), strict=True)
    nll = float(-found.label_log[row].astype(np.float64).mean())
    return Calibration([Bin(*part) for part in parts], of.ece, nll)
