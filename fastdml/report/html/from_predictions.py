"""What predictions.npz shows: gains by class, confusion, calibration, the most disputed images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from fastdml.errors import require
from fastdml.report.html.charts import Bar, reliability_chart
from fastdml.report.html.curves import ENSEMBLE
from fastdml.report.html.headline import Shown
from fastdml.report.predictions import Predictions
from fastdml.report.statistics import (
    BINS,
    Gain,
    Interval,
    calibration,
    class_accuracy,
    class_counts,
    confusion,
    gains,
    most_confused,
    right,
)

WHOLE_MATRIX = 50  # classes, at most; of more, the pairs
PAIRS = 30  # of confused classes
FEW_CLASSES = 40  # of which a table holds every one at once; else the first and last of them
ENDS = 12  # classes at each end of a long list
COUNTED = (
    "Below a gain its 95 % interval; gained and lost are the answers, one a peer and image, that "
    "became right and wrong."
)


class GainRow(NamedTuple):
    name: str  # of a class or another group of images
    images: int
    before: str  # %, of what is compared
    after: str
    gain: str  # points
    share: float  # of the largest gain or loss, -1 to 1, for a bar
    interval: str = ""  # of the gain
    gained: str = ""  # answers that became right
    lost: str = ""


class GainTable(NamedTuple):
    before: str  # what the columns hold
    after: str
    note: str
    rows: list[GainRow]
    several: bool  # whether there is anything to compare
    counted: bool  # whether answers gained and lost are known


class Diagram(NamedTuple):
    name: str
    chart: Markup
    ece: str
    nll: str
    bins: list[tuple[str, str, str, str]]  # confidence, images, mean confidence, accuracy


class Said(NamedTuple):
    who: str
    what: str
    probability: str
    right: bool


class Picture(NamedTuple):
    name: str  # its file, or its place among the images
    source: str  # a data: URI
    width: int
    height: int
    label: str
    disagreement: str
    says: list[Said]


def by_class(shown: Shown) -> GainTable | None:
    """Mutual against independent peers, the mean of their accuracies by class; without an
    independent run the ensemble against the best peer. The largest gain first."""
    found = shown.run.predictions
    if found is None:
        return None
    accuracy, K, C = class_accuracy(found), len(found.peers), found.num_classes
    note = _images_note(found)
    nothing = Gain(0, math.nan, math.nan, Interval(math.nan, math.nan), 0, 0)
    groups = [nothing._replace(images=int(n)) for n in class_counts(found)]
    if shown.both is not None:
        other = shown.both[1]
        before, after = class_accuracy(other)[:K].mean(axis=0), accuracy[:K].mean(axis=0)
        titles = ("independent (%)", "mutual (%)")
        note = f"Mean accuracy of the peers. {note} {COUNTED}"
        groups = gains(right(other)[:K], right(found)[:K], found.label, C)
    elif K > 1:
        best = int(np.argmax((found.top[:K] == found.label).mean(axis=1)))
        before, after = accuracy[best], accuracy[K]
        titles = (f"best peer, {found.peers[best]} (%)", "ensemble (%)")
    else:
        before = after = accuracy[0]
        titles = ("accuracy (%)", "accuracy (%)")
    several = K > 1 or shown.both is not None
    rows = gain_rows(
        [
            (found.class_name(c), group._replace(before=float(a), after=float(b)))
            for c, (group, a, b) in enumerate(zip(groups, before, after, strict=True))
        ]
    )
    order = np.argsort(-(after - before) if several else after, kind="stable")  # NaN last
    counted = shown.both is not None
    return GainTable(*titles, note, [rows[c] for c in order.tolist()], several, counted)


def gain_rows(groups: Sequence[tuple[str, Gain]]) -> list[GainRow]:
    """A row a group of images, by its name."""
    sizes = [abs(of.after - of.before) for _, of in groups]
    largest = max(filter(math.isfinite, sizes), default=0.0)
    rows = []
    for name, of in groups:
        gain = of.after - of.before
        share = gain / largest if largest and math.isfinite(gain) else 0.0
        interval = ""
        if all(map(math.isfinite, of.interval)):
            interval = " to ".join(_gain(end) for end in of.interval)
        rows.append(
            GainRow(
                *(name, of.images, _percent(of.before), _percent(of.after), _gain(gain), share),
                *(interval, f"{of.gained:,}", f"{of.lost:,}"),
            )
        )
    return rows


def confusion_table(found: Predictions) -> dict[str, Any]:
    """The whole matrix of the ensemble where the classes are few, and the pairs it confuses."""
    C = found.num_classes
    pairs = [
        (found.class_name(p.true), found.class_name(p.said), p.images, f"{100 * p.share:.1f}")
        for p in most_confused(found, PAIRS)
    ]
    matrix: list[tuple[str, list[tuple[int, float]]]] = []
    if C <= WHOLE_MATRIX:
        counts, of_class = confusion(found), class_counts(found)
        for i in range(C):
            shares = counts[i] / max(int(of_class[i]), 1)
            cells = list(zip(counts[i].tolist(), [round(float(s), 3) for s in shares], strict=True))
            matrix.append((found.class_name(i), cells))
    return {
        "who": ENSEMBLE if len(found.peers) > 1 else found.peers[0],
        "matrix": matrix,
        "names": [found.class_name(i) for i in range(C)] if matrix else [],
        "pairs": pairs,
        "errors": int((found.top[-1] != found.label).sum()),
        "images": len(found.label),
        "classes": C,
    }


def diagrams(found: Predictions) -> list[Diagram]:
    """A reliability diagram of each peer and of the ensemble."""
    names = [*found.peers, ENSEMBLE] if len(found.peers) > 1 else list(found.peers)
    return [_diagram(found, row, name) for row, name in enumerate(names)]


def disputed(found: Predictions) -> list[Picture]:
    """The pictures that the run kept, with what everybody says of them."""
    K = len(found.peers)
    names = [*found.peers, ENSEMBLE] if K > 1 else list(found.peers)
    pictures = []
    every = zip(found.pictured.tolist(), _brightened(found.pictures), strict=True)
    for k, (index, pixels) in enumerate(every):
        label = int(found.label[index])
        says = [
            Said(
                name,
                found.class_name(int(found.top[row, index])),
                _percent(float(found.confidence[row, index])),
                int(found.top[row, index]) == label,
            )
            for row, name in enumerate(names)
        ]
        height, width = pixels.shape[:2]
        pictures.append(
            Picture(
                *(
                    found.files[k] if found.files else f"image {index}",
                    _data_uri(pixels),
                    width,
                    height,
                    found.class_name(label),
                ),
                f"{float(found.disagreement[index]):.3f}",
                says,
            )
        )
    return pictures


def ends(rows: Sequence[GainRow]) -> tuple[Sequence[GainRow], Sequence[GainRow]]:
    """The rows to show at once, above and below the others; all of a short list."""
    return (rows, ()) if len(rows) <= FEW_CLASSES else (rows[:ENDS], rows[-ENDS:])


def _diagram(found: Predictions, row: int, name: str) -> Diagram:
    of = calibration(found, row)
    rows, bars = [], []
    most = max(part.images for part in of.bins) or 1
    for m, part in enumerate(of.bins):
        confidence = f"{100 * m / BINS:.0f}–{100 * (m + 1) / BINS:.0f}"
        mean, share = _percent(part.confidence), _percent(part.accuracy)
        rows.append((confidence, f"{part.images:,}", mean, share))
        text = f"confidence {confidence} %: {part.images:,} images, {share} % right"
        bars.append(Bar(m / BINS, (m + 1) / BINS, part.accuracy, part.images / most, text))
    ece, nll = _percent(of.ece, 2), f"{of.nll:.4f}" if math.isfinite(of.nll) else "–"
    title = f"Reliability of {name}"
    described = f"accuracy over confidence in {BINS} bins; calibration error {ece} %"
    chart = reliability_chart(f"reliability-{row}", title, described, bars)
    return Diagram(name, chart, ece, nll, rows)


def _images_note(found: Predictions) -> str:
    counts = class_counts(found)
    counts = counts[counts > 0]
    low, high = int(counts.min()), int(counts.max())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    missing = found.num_classes - len(counts)
    note = (
        f"A class has {each} images: one image more or less moves it by "
        f"{100 / high:.1f}" + ("" if low == high else f" to {100 / low:.1f}") + " points."
    )
    return note + (f" {missing:,} classes have none." if missing else "")


def _gain(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}" if math.isfinite(share) else "–"


def _brightened(pictures: np.ndarray) -> np.ndarray:
    """Pictures that use less than a quarter of the range of bytes, such as digits of 17 shades,
    stretched all alike."""
    brightest = int(pictures.max(initial=0))
    if not 0 < brightest < 64:
        return pictures
    return (pictures.astype(np.uint16) * 255 // brightest).astype(np.uint8)


def _data_uri(pixels: np.ndarray) -> str:
    """A PNG of (height, width, 1 or 3) uint8."""
    image = require("PIL.Image", "train")
    file = io.BytesIO()
    image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        file, "PNG", optimize=True
    )
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
