"""Whether the peers are as sure as they are right, and what one temperature makes of it.

Everything is in float64. An image without probabilities (a NaN, a +inf, or nothing but -inf among
its logits) counts as wrong, and turns the means that it is part of into NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdml.analysis.plots import drawn
from fastdml.arguments import listed, numbers, of_kind, shown, whole_number
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.statistics import BINS, Reliability, reliability

LOWEST, HIGHEST = 0.01, 100.0  # temperatures that are fitted
STEPS = 100  # at most; half a dozen are usual
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class CalibrationScores(Result):
    """Means over N images, of probabilities softmax(logits)."""

    reliability: Reliability  # with expected and maximum calibration error
    accuracy: float
    confidence: float  # the largest probability
    entropy: float  # nats
    nll: float  # nats
    brier: float  # squared distance of the probabilities from the label's, 0 to 2


@dataclass(frozen=True)
class TemperatureScaling(Result):
    """Before and after dividing the logits by a temperature that other images chose."""

    temperatures: tuple[float, ...]
    """One, fitted on the images given for it; or two, each fitted on the half that the other one
    scales."""
    before: CalibrationScores
    after: CalibrationScores


@dataclass(frozen=True)
class PeersTemperatureScaling(Result):
    """Of K peers and of their ensemble, the mean of their probabilities, R = K + 1 rows; of a lone
    peer one row."""

    peers: tuple[str, ...]  # R names
    images: int
    temperatures: np.ndarray  # (R, 2): of each half of the images, fitted on the other
    ece: np.ndarray  # (R,)
    scaled_ece: np.ndarray  # (R,)
    nll: np.ndarray  # (R,), nats
    scaled_nll: np.ndarray  # (R,), nats


def calibration_scores(
    logits: Any, labels: Any, *, bins: int = BINS, equal_mass: bool = False
) -> CalibrationScores:
    """Calibration, NLL, Brier score and entropy of N images. logits: (N, C) numbers, an array or a
    tensor, on any device; log-probabilities do as well. labels: (N,) class indices. bins,
    equal_mass: as of `reliability`. Raises InputError for shapes or labels that do not fit."""
    z, y = _checked(logits, labels)
    log_p = _log_softmax(z)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        surprise = np.where(p == 0, 0.0, p * log_p)  # 0 log 0 is 0; NaN stays
    rows = np.arange(len(y))
    top = p.argmax(axis=1)
    confidence = p[rows, top]  # argmax gives a NaN where there is one
    right = (top == y) & np.isfinite(confidence)
    return CalibrationScores(
        reliability=reliability(confidence, right, bins=bins, equal_mass=equal_mass),
        accuracy=float(right.mean()),
        confidence=float(confidence.mean()),
        entropy=float(-surprise.sum(axis=1).mean()),
        nll=float(-log_p[rows, y].mean()),
        brier=float(((p**2).sum(axis=1) - 2 * p[rows, y] + 1).mean()),
    )


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature T whose softmax(logits / T) gives the labels (N,) the lowest NLL: convex in
    1 / T, so that Newton's method, kept within a bracket, finds it. Within 0.01 to 100; the lower
    end where every label has the largest logit, since the NLL then falls without end. logits:
    (N, C), -inf for a class that is ruled out. Raises InputError where no temperature can be told:
    for logits that give no probabilities, and labels that are ruled out."""
    z, y = _checked(logits, labels)
    true = z[np.arange(len(y)), y]
    if bad := int((~np.isfinite(_log_softmax(z).max(axis=1))).sum()):
        raise InputError(f"no temperature fits logits of {bad} of {len(y)} images: they are NaN")
    if bad := int((~np.isfinite(true)).sum()):
        raise InputError(f"no temperature fits: {bad} of {len(y)} labels have probability 0")
    low, high, b = 1 / HIGHEST, 1 / LOWEST, 1.0
    if _slopes(z, true, b) == (0, 0):
        return 1.0  # of logits that are all alike every temperature makes the same
    if _slopes(z, true, low)[0] >= 0:
        return HIGHEST
    if _slopes(z, true, high)[0] <= 0:
        return LOWEST
    for _ in range(STEPS):
        slope, curve = _slopes(z, true, b)
        low, high = (b, high) if slope < 0 else (low, b)
        following = b - slope / curve if curve > 0 else low
        if not low < following < high:
            following = (low * high) ** 0.5
        if abs(following - b) <= 1e-12 * b:
            break
        b = following
    return 1 / b


def temperature_scaling(
    logits: Any,
    labels: Any,
    *,
    fit: tuple[Any, Any] | None = None,
    bins: int = BINS,
    equal_mass: bool = False,
    seed: int = 0,
) -> TemperatureScaling:
    """The baseline of every other calibration: Guo et al. 2017, section 4.2. The temperature is
    never judged on images that it was fitted on. fit: logits and labels of other images, such as
    those of a validation set; without these the images are split into two halves at random (seed),
    and each is scaled by the temperature of the other. The rest is as of `calibration_scores`."""
    z, y = _checked(logits, labels)
    if fit is not None:
        temperatures: tuple[float, ...] = (fit_temperature(*_pair(fit)),)
        scaled = z / temperatures[0]
    else:
        if len(y) < 2:
            raise InputError("one image has no other half to fit a temperature on: give fit")
        order = np.random.default_rng(whole_number("seed", seed, 0)).permutation(len(y))
        halves = order[: len(y) // 2], order[len(y) // 2 :]
        fitted = [fit_temperature(z[half], y[half]) for half in halves]
        temperatures = (fitted[1], fitted[0])
        scaled = np.empty_like(z)
        for half, temperature in zip(halves, temperatures, strict=True):
            scaled[half] = z[half] / temperature
    before, after = (
        calibration_scores(of, y, bins=bins, equal_mass=equal_mass) for of in (z, scaled)
    )
    return TemperatureScaling(temperatures, before, after)


def peers_temperature_scaling(
    logits: Sequence[Any], labels: Any, names: Sequence[str], *, seed: int = 0
) -> PeersTemperatureScaling:
    """`temperature_scaling` of each peer by itself, and of the ensemble, whose logits are the
    logarithms of its probabilities. logits: K of (N, C). names: K."""
    arrays = [_checked(z, labels)[0] for z in listed("logits", logits, "K arrays (N, C)")]
    rows = listed("names", names, "names, one a peer")
    if not arrays or len(rows) != len(arrays):
        raise InputError(f"logits of {len(arrays)} peers and {len(rows)} names: give one for each")
    if len(arrays) > 1:
        log_p = np.stack([_log_softmax(z) for z in arrays])
        with np.errstate(divide="ignore"):
            arrays.append(np.log(np.exp(log_p).mean(axis=0)))
        rows.append(ENSEMBLE)
    found = [temperature_scaling(z, labels, seed=seed) for z in arrays]
    return PeersTemperatureScaling(
        peers=tuple(rows),
        images=len(arrays[0]),
        temperatures=np.array([one.temperatures for one in found]),
        ece=np.array([one.before.reliability.ece for one in found]),
        scaled_ece=np.array([one.after.reliability.ece for one in found]),
        nll=np.array([one.before.nll for one in found]),
        scaled_nll=np.array([one.after.nll for one in found]),
    )


def plot_reliability(found: Reliability, where: Any) -> Any:
    """Accuracy over confidence as bars, darker where they hold more images, against the diagonal of
    the perfectly calibrated; and the share of images in each bin, which is the histogram of the
    confidence, as steps. where: as of `drawn`."""
    of_kind("found", found, Reliability, "reliability")

    def draw(axes: Any) -> None:
        left, width = found.edges[:-1], np.diff(found.edges)
        share = found.images / max(int(found.images.sum()), 1)
        for m in np.flatnonzero(found.images):
            alpha = 0.35 + 0.65 * float(found.images[m] / found.images.max()) ** 0.5
            axes.bar(
                left[m], found.accuracy[m], width[m], align="edge", color="#0072B2", alpha=alpha
            )
        axes.stairs(share, found.edges, color="#D55E00", label="share of the images")
        axes.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.set_title(f"ECE {100 * found.ece:.2f} %, MCE {100 * found.mce:.2f} %", loc="left")
        axes.legend(loc="upper left", frameon=False)

    return drawn(where, draw)


def plot_temperature_scaling(found: TemperatureScaling, where: Any) -> Any:
    """Accuracy over mean confidence before and after. where: as of `drawn`."""
    of_kind("found", found, TemperatureScaling, "temperature_scaling")

    def draw(axes: Any) -> None:
        for name, of, look in (("before", found.before, "o-"), ("after", found.after, "s-")):
            line = of.reliability
            there = line.images > 0
            label = f"{name}: ECE {100 * line.ece:.2f} %, NLL {of.nll:.3f}"
            axes.plot(line.confidence[there], line.accuracy[there], look, label=label)
        axes.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        told = " and ".join(f"{t:.3f}" for t in found.temperatures)
        axes.set_title(f"temperature {told}", loc="left")
        axes.legend(loc="upper left", frameon=False)

    return drawn(where, draw)


def _checked(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) in float64 and labels (N,) in int64."""
    z, y = numbers("logits", logits).astype(np.float64), numbers("labels", labels)
    if z.ndim != 2 or not z.size or y.shape != z.shape[:1]:
        raise InputError(
            f"logits must be (N, C) and labels (N,), not {list(z.shape)} and {list(y.shape)}"
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= z.shape[1]:
        raise InputError(f"labels must be whole numbers within 0..{z.shape[1] - 1}")
    return z, y.astype(np.int64)


def _pair(fit: Any) -> Any:
    if not isinstance(fit, (tuple, list)) or len(fit) != 2:
        raise InputError(f"fit must be a pair (logits, labels), not {shown(fit)}")
    return fit


def _log_softmax(z: np.ndarray) -> np.ndarray:
    """(N, C), NaN where a row has no probabilities."""
    with np.errstate(invalid="ignore"):
        shifted = z - z.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _slopes(z: np.ndarray, true: np.ndarray, b: float) -> tuple[float, float]:
    """First and second derivative, by b, of the NLL of softmax(b z): the expected logit less the
    true one, and the variance of the logit, as means over the images."""
    p = np.exp(_log_softmax(b * z))
    above = np.where(p == 0, 0.0, z - true[:, None])
    mean = (p * above).sum(axis=1)
    spread = (p * (above - mean[:, None]) ** 2).sum(axis=1)
    return float(mean.mean()), float(spread.mean())
