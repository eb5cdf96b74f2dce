"""What the peers say of each test image, kept by the evaluation that ends a run and saved with it.

Every evaluation keeps a few numbers an image and the few images on which the peers disagree most,
all on the device: the step that fetches them is the saving, once a run, and no image is read twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdml import parallel
from fastdml.cohort import Cohort
from fastdml.engine.amp import Amp
from fastdml.eval_mode import evaluating
from fastdml.files import writing
from fastdml.metrics import Classification as Counts
from fastdml.metrics import ClassificationScores
from fastdml.metrics.classification import COLUMNS, Rows
from fastdml.peer_groups import group_names
from fastdml.report.metrics_log import group_folder
from fastdml.report.predictions import (
    PICTURE_SIDE,
    PICTURES,
    PREDICTIONS,
    Predictions,
    write_predictions,
)
from fastdml.train.batches import Batches
from fastdml.train.sharding import Dealt

if TYPE_CHECKING:
    from fastdml.parallel import Mesh


class Scorer:
    """Scores cohorts in evaluation mode on the same batches (images, labels), and keeps of the last
    one what it said of each image. keep: False keeps nothing.

    Of a cohort on a mesh all ranks call it together: the columns take turns with the batches, peers
    are evaluated where they are, and every rank gets the same scores, to the bit those of one
    process. What is kept stays on the ranks until `predictions` puts it together.
    """

    shares_ranks = True  # knows what to do on a mesh

    def __init__(self, test: Batches, amp: Amp, *, keep: bool = True) -> None:
        self.test, self.amp, self.keep = test, amp, keep
        self.rows: Rows | None = None  # of this rank's batches
        self.places = torch.empty(0, dtype=torch.int64)  # (N,) of these rows among all
        self.pictures = [Pictures()]  # of each group of peers

    def __call__(self, cohort: Cohort) -> ClassificationScores:
        mesh, groups = cohort.mesh, cohort.groups
        size = (len(cohort), cohort.num_classes, self.amp.device)
        counts = Counts(*size, keep=self.keep, groups=groups)
        self.pictures = [Pictures() for _ in range(groups)]
        places = [self.places[:0]]
        turns = Dealt(self.test, mesh)
        with torch.inference_mode():
            for start, images, labels, own in turns:
                with self.amp.autocast():
                    logits = parallel.forward(cohort, images)
                if not own:
                    continue
                counts.update(logits, labels)
                places.append(torch.arange(start, start + len(labels)))
                for g, pictures in enumerate(self.pictures if self.keep else ()):
                    pictures.add(images, _of_group(counts.kept[-1], g, groups), start)
            turns.check()
            if mesh is not None and mesh.data > 1:
                _add_columns(counts, turns.steps, mesh)
        scores = counts.compute()
        self.rows = counts.kept_rows() if self.keep else None
        self.places = torch.cat(places)
        return scores

    def predictions(self, cohort: Cohort, weights: str, group: int = 0) -> Predictions:
        """Of the cohort that was scored last, which is `cohort`, or of one of the groups that its
        peers are in; on a mesh all ranks call it."""
        assert self.rows is not None, "nothing has been scored"
        known, mesh = cohort.record(), cohort.mesh
        found, chosen = _of_group(self.rows, group, cohort.groups), self.pictures[group]
        if mesh is not None and mesh.data > 1:
            found = _all_rows(found, self.places, mesh)
            chosen.join(mesh)
        rows = [tensor.cpu().numpy() for tensor in found]
        names = known["classes"] or getattr(self.test, "class_names", None) or ()
        mean, std = (known[n] or getattr(self.test, n, None) for n in ("mean", "std"))
        pictured, pictures, true_colours = chosen.fetch(mean, std)
        return Predictions(
            peers=group_names(cohort, group),
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
        self.images: Tensor | None = None  # (M, channels, h, w), float32
        self.interest = self.place = torch.empty(0)  # (M,) of each image

    def add(self, images: Tensor, rows: Rows, start: int) -> None:
        """A batch (N, channels, H, W), of which `rows` were kept, from place `start` of the set on.
        What no picture can be made of is passed over."""
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

    def join(self, mesh: Mesh) -> None:
        """Chooses among the images of all columns; all ranks call it."""
        own = None if self.images is None else [len(self.images), *self.images.shape[1:]]
        found = mesh.gather(own)[mesh.row * mesh.data :][: mesh.data]
        sizes = [size for size in found if size is not None]
        if not sizes:
            return
        count, shape, device = max(size[0] for size in sizes), sizes[0][1:], mesh.device
        images = torch.zeros(count, *shape, device=device)
        interest = torch.full((count,), -torch.inf, device=device)
        place = torch.zeros(count, dtype=torch.int64, device=device)
        if self.images is not None and [*self.images.shape[1:]] == shape:
            n = len(self.images)
            images[:n], interest[:n], place[:n] = self.images, self.interest, self.place
        interest, place, images = (_columns(t, mesh) for t in (interest, place, images))
        most, chosen = interest.topk(min(self.count, int((interest > -torch.inf).sum())))
        self.images, self.interest, self.place = images[chosen], most, place[chosen]

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
    """Saves into the run's folder, of groups into the folder of each, what `evaluate` kept of the
    cohort that it scored last, which has the weights of `cohort`. Where it has scored none, because
    the run was resumed at its end, and nothing is saved yet, it scores the cohort first. Of other
    evaluations than a `Scorer` nothing is saved. weights: "last" or "best".

    On a mesh all ranks call it, and rank 0 writes. Raises InputError where the file cannot be
    written.
    """
    if not isinstance(evaluate, Scorer) or not evaluate.keep:
        return
    mesh = cohort.mesh
    places = [folder]
    if cohort.groups > 1:
        places = [group_folder(folder, g) for g in range(cohort.groups)]
    if evaluate.rows is None:
        saved = all((place / PREDICTIONS).exists() for place in places)
        if saved if mesh is None else mesh.share(saved):
            return
        averaged = nullcontext() if mesh is None else parallel.averaged_statistics(cohort, mesh)
        with averaged, evaluating(cohort):
            evaluate(cohort)
    for g, place in enumerate(places):
        predictions = evaluate.predictions(cohort, weights, g)
        if mesh is None or mesh.lead:
            with writing(place):
                place.mkdir(parents=True, exist_ok=True)
            write_predictions(place, predictions)
    evaluate.rows = None  # another cohort's may follow


def _of_group(rows: Rows, g: int, groups: int) -> Rows:
    return rows if groups == 1 else rows.of_group(g, groups)


def _add_columns(counts: Counts, steps: int, mesh: Mesh) -> None:
    """Gives the counts of one column's batches those of the others, in the order of the set."""
    rows, columns = counts.K + 1, slice(mesh.column, None, mesh.data)
    sums = torch.zeros(steps, rows, COLUMNS, dtype=torch.float64, device=counts.device)
    if counts.sums:
        sums[columns] = torch.stack(counts.sums)
    seen = torch.tensor([counts.rows], device=counts.device)
    for tensor in (sums, seen):  # all others gave zeros for what one gives
        dist.all_reduce(tensor, group=mesh.data_group)
    counts.sums, counts.rows = list(sums), int(seen)


def _all_rows(own: Rows, places: Tensor, mesh: Mesh) -> Rows:
    """The rows of all columns in the order of the set. places: (N,) of the own ones."""
    count = torch.tensor([len(places)], device=own.label.device)
    dist.all_reduce(count, group=mesh.data_group)
    found = []
    for tensor in own:
        rows = tensor.new_zeros(*tensor.shape[:-1], int(count))
        rows[..., places.to(rows.device)] = tensor
        dist.all_reduce(rows, group=mesh.data_group)
        found.append(rows)
    return Rows(*found)


def _columns(tensor: Tensor, mesh: Mesh) -> Tensor:
    """The tensors of all columns, of one shape, one after the other."""
    found = [torch.empty_like(tensor) for _ in range(mesh.data)]
    dist.all_gather(found, tensor, group=mesh.data_group)
    return torch.cat(found)


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
