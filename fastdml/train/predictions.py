"""What the peers say of each test image, kept by the evaluation that ends a run and saved with it.

Every evaluation keeps a few numbers an image and the few images on which the peers disagree most,
all on the device: the step that fetches them is the saving, once a run, and no image is read twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.engine.amp import Amp
from fastdml.eval_mode import evaluating
from fastdml.metrics import Classification as Counts
from fastdml.metrics import ClassificationScores
from fastdml.metrics.classification import Rows
from fastdml.report.predictions import (
    PICTURE_SIDE,
    PICTURES,
    PREDICTIONS,
    Predictions,
    write_predictions,
)
from fastdml.train.batches import Batches


class Scorer:
    """Scores cohorts in evaluation mode on the same batches (images, labels), and keeps of the last
    one what it said of each image. keep: False keeps nothing."""

    def __init__(self, test: Batches, amp: Amp, *, keep: bool = True) -> None:
        self.test, self.amp, self.keep = test, amp, keep
        self.rows: Rows | None = None
        self.pictures = Pictures()

    def __call__(self, cohort: Cohort) -> ClassificationScores:
        counts = Counts(len(cohort), cohort.num_classes, self.amp.device, keep=self.keep)
        self.pictures = Pictures()
        with torch.inference_mode():
            for images, labels in self.test.epoch(0):
                with self.amp.autocast():
                    logits = cohort(images)
                counts.update(logits, labels)
                if self.keep:
                    self.pictures.add(images, counts.kept[-1])
        scores = counts.compute()
        self.rows = counts.kept_rows() if self.keep else None
        return scores

    def predictions(self, cohort: Cohort, weights: str) -> Predictions:
        """Of the cohort that was scored last, which is `cohort`."""
        assert self.rows is not None, "nothing has been scored"
        known = cohort.record()
        rows = [tensor.cpu().numpy() for tensor in self.rows]
        names = known["classes"] or getattr(self.test, "class_names", None) or ()
        mean, std = (known[n] or getattr(self.test, n, None) for n in ("mean", "std"))
        pictured, pictures, true_colours = self.pictures.fetch(mean, std)
        return Predictions(
            peers=tuple(cohort.names),
            classes=tuple(map(str, names)) if len(names) == cohort.num_classes else (),
            num_classes=cohort.num_classes,
            weights=weights,
            label=rows[0].astype(np.int32),
            top=rows[1].astype(np.int32),
            confidence=rows[2],
            label_log=rows[3],
            disagreement=rows[4],
            pictured=pictured,
            pictures=pictures,
            true_colours=true_colours,
            files=_below_common(getattr(self.test, "paths", None) or (), pictured),
        )


class Pictures:
    """The images of most interest so far, small, on the device: those on which peers disagree most;
    of a lone peer those whose label it finds least probable."""

    def __init__(self, count: int = PICTURES) -> None:
        self.count = count
        self.seen = 0  # images
        self.images: Tensor | None = None  # (M, channels, h, w), float32
        self.interest = self.place = torch.empty(0)  # (M,) of each image

    def add(self, images: Tensor, rows: Rows) -> None:
        """A batch (N, channels, H, W), of which `rows` were kept. What no picture can be made of is
        passed over."""
        start, self.seen = self.seen, self.seen + len(images)
        if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            return
        K = len(rows.top) - 1
        interest = rows.disagreement if K > 1 else -rows.label_log[0]
        most, place = interest.nan_to_num(nan=-1.0).topk(min(self.count, len(images)))
        found = _small(images[place].float())
        place = place + start
        if self.images is not None:
            if self.images.shape[1:] != found.shape[1:]:
                return
            found = torch.cat([self.images, found])
            most, place = torch.cat([self.interest, most]), torch.cat([self.place, place])
            most, kept = most.topk(min(self.count, len(most)))
            found, place = found[kept], place[kept]
        self.images, self.interest, self.place = found, most, place

    def fetch(self, mean: Any, std: Any) -> tuple[np.ndarray, np.ndarray, bool]:
        """Places (M,) and pictures (M, h, w, channels) uint8, and whether their colours are true.
        mean, std: of the images' normalisation, in units of bytes; None: each picture is stretched
        from black to white."""
        if self.images is None:
            return np.zeros(0, np.int64), np.zeros((0, 1, 1, 1), np.uint8), False
        images = self.images.cpu().permute(0, 2, 3, 1).double()
        known = mean is not None and std is not None
        if known:
            images = images * torch.tensor(std).double() + torch.tensor(mean).double()
        else:
            low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
            images = (images - low) / (high - low).clamp(min=1e-12) * 255
        images = images.nan_to_num().round().clamp(0, 255).to(torch.uint8)
        return self.place.cpu().numpy(), images.numpy(), known


def save_predictions(folder: Path, cohort: Cohort, evaluate: Any, weights: str = "last") -> None:
    """Saves into the run's folder what `evaluate` kept of the cohort that it scored last, which has
    the weights of `cohort`. Where it has scored none, because the run was resumed at its end, and
    nothing is saved yet, it scores the cohort first. Of other evaluations than a `Scorer` nothing
    is saved. weights: "last" or "best".

    Raises InputError where the file cannot be written.
    """
    if not isinstance(evaluate, Scorer) or not evaluate.keep:
        return
    if evaluate.rows is None:
        if (folder / PREDICTIONS).exists():
            return
        with evaluating(cohort):
            evaluate(cohort)
    write_predictions(folder, evaluate.predictions(cohort, weights))
    evaluate.rows = None  # another cohort's may follow


def _below_common(paths: Sequence[str], places: np.ndarray) -> tuple[str, ...]:
    """The paths at some places, each below the folder that all of them lie in."""
    if not paths:
        return ()
    try:
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # some are relative, others absolute
        folder = ""
    return tuple(os.path.relpath(paths[i], folder) if folder else paths[i] for i in places.tolist())


def _small(images: Tensor) -> Tensor:
    """Images (M, channels, H, W) with no side longer than a picture's."""
    height, width = images.shape[2:]
    longest = max(height, width)
    if longest <= PICTURE_SIDE:
        return images
    size = [max(1, round(side * PICTURE_SIDE / longest)) for side in (height, width)]
    return torch.nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)
