"""Run folders made by hand, and a parser of the pages made from them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fastdml.report.metrics_log import MetricsLog
from fastdml.report.predictions import Predictions, write_predictions
from fastdml.report.summary import write_summary
from fastdml.train.config.sources import preset
from fastdml.train.tasks import classification

# Elements that HTML closes by itself.
VOID = {"meta", "link", "img", "br", "input", "hr", "area", "base", "col", "embed", "source", "wbr"}


def predictions(K=2, N=40, C=3, *, seed=0, weights="last", peers=None, classes=None, pictures=4):
    random = np.random.default_rng(seed)
    label = random.integers(0, C, N).astype(np.int32)
    top = random.integers(0, C, (K + 1, N))
    top = np.where(random.random((K + 1, N)) < 0.6, label, top).astype(np.int32)
    confidence = random.uniform(1 / C, 1, (K + 1, N)).astype(np.float32)
    right = top == label
    label_log = np.log(np.where(right, confidence, (1 - confidence) / max(C - 1, 1)))
    return Predictions(
        peers=tuple(peers or [f"resnet8-{k + 1}" for k in range(K)]),
        classes=tuple(classes if classes is not None else [f"class {c}" for c in range(C)]),
        num_classes=C,
        weights=weights,
        label=label,
        top=top,
        confidence=confidence,
        label_log=label_log.astype(np.float32),
        disagreement=random.uniform(0, 0.6, N).astype(np.float32),
        pictured=np.arange(pictures, dtype=np.int64),
        pictures=random.integers(0, 256, (pictures, 8, 8, 3)).astype(np.uint8),
        true_colours=True,
    )


def predictions_of(top, label, confidence=None, *, num_classes: int | None = None, **changes: Any):
    """Of answers that are known. top: (K + 1, N) classes, by K peers and, last, by the ensemble.
    label: (N,)."""
    top, label = np.asarray(top, np.int32), np.asarray(label, np.int32)
    sure = np.full(top.shape, 0.5) if confidence is None else np.asarray(confidence)
    C = num_classes or int(max(top.max(), label.max())) + 1
    values: dict[str, Any] = {
        "peers": tuple(f"peer {k + 1}" for k in range(len(top) - 1)),
        "classes": (),
        "num_classes": C,
        "weights": "last",
        "label": label,
        "top": top,
        "confidence": sure.astype(np.float32),
        "label_log": np.log(np.full(top.shape, 0.5, np.float32)),
        "disagreement": np.zeros(len(label), np.float32),
        "pictured": np.zeros(0, np.int64),
        "pictures": np.zeros((0, 1, 1, 1), np.uint8),
        "true_colours": False,
    }
    return Predictions(**values | changes)


def scores(found: Predictions) -> dict:
    """Of the classification kind, from predictions; those that need more are made up."""
    hits = (found.top == found.label).mean(axis=1).tolist()
    nll = (-found.label_log.astype(np.float64)).mean(axis=1).tolist()
    values: dict = {"rows": len(found.label)}
    for name, value in (("top1", hits), ("top5", hits), ("ece", [0.1] * len(hits)), ("nll", nll)):
        values |= {name: value[:-1], f"ensemble_{name}": value[-1]}
    return values


def make_run(
    folder: Path,
    found: Predictions | None = None,
    *,
    epochs: int = 3,
    peers=None,
    evaluated: str = "test",
    ended: bool = True,
    summary: dict | None = None,
    keep: bool = True,
    **settings,
) -> Path:
    """A run on digits that logged `epochs` epochs. evaluated: the kind of its evaluations, or
    empty. summary: more of its summary's entries. keep: whether it has predictions.npz."""
    found = found or predictions()
    names = list(peers or found.peers)
    K = len(names)
    folder.mkdir(parents=True)
    config = preset("digits", epochs=max(epochs, 1), peers=("resnet8",) * K, **settings)
    config.replace(folder=str(folder)).save(folder / "config.yaml")
    last = scores(found)
    with MetricsLog(folder, names, tensorboard=False) as log:
        for epoch in range(1, epochs + 1):
            losses = [1.0 / (epoch + k) for k in range(K)]
            pairs = [[0.0 if i == j else 0.1 * (i + 1) / epoch for j in range(K)] for i in range(K)]
            values = {"ce": losses, "kl": losses, "loss": losses, "pairwise_kl": pairs}
            log.log("train", 10 * epoch, epoch, **values)
            log.log("epoch", 10 * epoch, epoch, **values, images_per_second=1000.0 + epoch,
                    data_wait=0.01 * epoch)  # fmt: skip
            if evaluated:
                log.log(evaluated, 10 * epoch, epoch, **last)
    if ended:
        (folder / "cohort.json").write_text("{}")
        if evaluated:
            phase = {
                "scores": last,
                "best_scores": last,
                "best_epoch": 2,
                "images_per_second": 1234.0,
                "wall_seconds": 60.0,
                "data_wait": 0.02,
                "precision": "fp32",
            }
            write_summary(
                folder,
                config=config.to_dict(),
                scoring=classification.SCORING,
                peers=names,
                parameters=[1000] * K,
                device="CPU of a test",
                execution="eager",
                threads=1,
                command="fastdml train digits",
                mutual=phase,
            )
            if summary:
                import json

                path = folder / "summary.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | summary))
        if keep:
            write_predictions(folder, found)
    return folder


def make_retrieval_run(folder: Path) -> Path:
    """A run on Market-1501 of two peers, with an independent run."""
    from fastdml.train.tasks import reid

    names = ["resnet50-1", "resnet50-2"]
    for place, shift in ((folder, 0.02), (folder / "independent", 0.0)):
        place.mkdir(parents=True)
        preset("market1501").replace(
            peers=("resnet50",) * 2, kl_weight=float(shift > 0), folder=str(place)
        ).save(place / "config.yaml")
        found: dict = {"queries": 3368}
        for name, low in (("mAP", 0.6), ("mINP", 0.3), ("rank1", 0.8), ("rank5", 0.9)):
            values = [low + shift, low + shift + 0.01]
            found |= {name: values, f"ensemble_{name}": low + 0.05}
        found |= {"tpr_1e4": [0.5, 0.6], "ensemble_tpr_1e4": 0.7}
        with MetricsLog(place, names, tensorboard=False) as log:
            for epoch in (1, 2):
                values = {"ce": [2.0 / epoch] * 2, "kl": [0.2] * 2, "metric": [0.5] * 2}
                log.log("epoch", epoch, epoch, **values, images_per_second=100.0, data_wait=0.0)
                log.log("test", epoch, epoch, **found)
        (place / "cohort.json").write_text("{}")
        if shift:
            found |= {"rank20": [], "ensemble_rank20": None}  # as an earlier version's is read
            phase = {"scores": found, "best_scores": found, "best_epoch": 2, "wall_seconds": 9.0}
            write_summary(
                place,
                config={},
                scoring=reid.SCORING,
                peers=names,
                parameters=[25_000_000] * 2,
                device="CPU of a test",
                execution="eager",
                threads=1,
                command="fastdml train market1501",
                mutual=phase,
            )
    return folder


def analyses(names, *, layers=2, side=5, sha256="0" * 64) -> dict:
    """What analysis.json holds of these peers, with numbers that are easy to find on a page.
    sha256: of their weights."""
    K = len(names)
    ensemble = [*names, "ensemble"] if K > 1 else list(names)
    told = {"weights": "last", "images": 1234, "sha256": sha256, "seed": 0}
    scales = [0.0, 0.1, 0.25]
    at = [-0.25, 0.0, 0.5, 1.0, 1.25]
    x = [-0.5 + i / 2 for i in range(side)]
    square = [[1.0 if i == j else 0.25 + 0.125 * i for j in range(K)] for i in range(K)]
    found: dict = {
        "posterior": {
            "peers": ensemble,
            "entropy": [0.5 + 0.125 * k for k in range(len(ensemble))],
            "top1": [0.75 - 0.03125 * k for k in range(len(ensemble))],
            **told,
        },
        "flat_minima": {
            "peers": list(names),
            "scales": scales,
            "loss": [[0.25 * (k + 1) + scale for scale in scales] for k in range(K)],
            "spread": [[0.0, 0.01, 0.02] for _ in range(K)],
            "draws": 5,
            "noise": "filter",
            **told,
        },
        "kernel_alignment": {
            "peers": list(names),
            "layers": [f"stage {k + 1}" for k in range(layers)],
            "alignment": [square] * layers,
            **told,
        },
        "temperature_scaling": {
            "peers": ensemble,
            "temperatures": [[1.5, 1.625]] * len(ensemble),
            "scaled_ece": [0.0125 * (k + 1) for k in range(len(ensemble))],
            "scaled_nll": [0.375] * len(ensemble),
            **told,
        },
    }
    if K > 1:
        found["loss_section"] = [
            {
                "peers": [names[0], names[k]],
                "at": at,
                "loss": [0.5 + k + abs(t - 0.5) for t in at],
                "accuracy": [0.875] * 5,
                "barrier": 0.0625 * k,
                **told,
            }
            for k in range(1, K)
        ]
        found["loss_plane"] = {
            "peers": list(names[:3]),
            "x": x,
            "y": x,
            "loss": [[0.125 + a * a + b * b for a in x] for b in x],
            "points": [[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]][: min(K, 3)],
            **told,
        }
    return found


class Page(HTMLParser):
    """A page as elements and text. Raises AssertionError where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[tuple[int, str]] = []
        self._table: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table, self._caption = [], ""
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td") and self._table:
            self._table[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))
        elif tag == "small" and self._table:
            self._table[-1][-1] += " | "

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.open)
        if tag == "table":
            self.tables.setdefault(self._caption.strip(), self._table)

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if "caption" in self.open:
            self._caption += data
        elif self._table and {"td", "th"} & set(self.open):
            self._table[-1][-1] += data.strip()
        if self.open and self.headings and {"h1", "h2", "h3"} & set(self.open):
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def table(self, start: str) -> list[list[str]]:
        """The first table whose caption begins so."""
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))
