"""The result of a training run: plain values, a table of them, a data frame of every epoch."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdml.cohort_teachers import Identity
from fastdml.errors import MissingExtra
from fastdml.report.scoring import ensembles
from fastdml.report.tables import fixed_columns
from fastdml.train.config.base import TrainConfig
from fastdml.train.tasks.task import scoring_of
from fastdml.units import percent

if TYPE_CHECKING:
    import pandas

IMAGES = ("validation", "test")  # that scores are of
LOSSES = {"ce": "cross-entropy", "kl": "KL", "metric": "loss on features"}


@dataclass(frozen=True)
class TrainResult:
    """`print` shows a table of the peers, a notebook also the curves; `to_frame` has the epochs."""

    folder: Path
    config: TrainConfig
    peers: tuple[str, ...]  # display names, in order
    parameters: tuple[int, ...]  # trainable parameters of each peer
    history: list[dict[str, Any]]  # the epoch records of metrics.jsonl, in order
    scores: Any  # of the last weights, for instance ClassificationScores; None without evaluation
    best_epoch: float  # epochs trained when the peers' mean score was best; 0: not evaluated
    best_scores: Any  # of the best weights, on the same images
    weights: dict[str, Path]  # "last" and "best": folders that Cohort.load reads
    images_per_second: float  # of training alone, first steps left out; 0 if too short to tell
    data_wait: float  # share of that time spent waiting for batches, 0 to 1
    seconds: float  # of training and evaluation, over all resumptions
    skipped_steps: int  # updates left out because an fp16 gradient overflowed
    device: str  # for instance "cpu" or "NVIDIA H100"
    precision: str  # of the networks: "fp32", "bf16" or "fp16"
    execution: str | None  # of the steps, for instance "eager"
    threads: int | None  # of the steps, on a CPU
    images: Mapping[str, int] | None = None
    """How many training images are "labelled" and "unlabelled"; None where that is not known."""
    stopped: str | None = None  # why training ended before its last epoch
    chosen_on: Literal["validation", "test"] | None = None
    """The images that chose the best weights. With validation `scores` and `best_scores` are of the
    test set, read at the end, or without a test set of the validation images."""
    validation_scores: Any = None  # of the last weights
    best_validation_scores: Any = None  # that the best weights were chosen by
    independent: TrainResult | None = None  # the same peers trained without the KL term
    teachers: tuple[Identity, ...] = ()  # by which the peers were taught, without their weights
    mesh: Mapping[str, Any] | None = None
    """Of a run on a mesh: its sizes peer and data, ranks, the row of each peer (rows), and
    bytes_a_step, what all ranks together send of logits, distances and weights."""

    @property
    def scored_on(self) -> Literal["validation", "test"] | None:
        """The images that `scores` and `best_scores` are of."""
        tested = self.scores is not self.validation_scores
        return ("test" if tested else "validation") if self.scores else None

    @property
    def headline(self) -> Any:
        """The scores that the run is judged by: of the best weights where validation images chose
        them, else of the last."""
        return self.best_scores if self.chosen_on == "validation" else self.scores

    def __repr__(self) -> str:
        return f"<TrainResult of {len(self.peers)} peers in {self.folder}: print shows a table>"

    def __str__(self) -> str:
        return f"{fixed_columns(self._rows())}\n{self._note()}"

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell in row] for row in self._rows()]
        lines = ["".join(f"<th>{cell}</th>" for cell in head)]
        lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table>{rows}</table><p>{html.escape(self._note())}</p>{self._curves()}"

    def _curves(self) -> str:
        """The picture of the curves as HTML; nothing where the run drew none, or it is gone."""
        try:
            picture = base64.b64encode((self.folder / "curves.png").read_bytes()).decode()
        except OSError:
            return ""
        what = html.escape(f"Losses and scores by epoch of {', '.join(self.peers)}")
        return f'<img width="510" alt="{what}" src="data:image/png;base64,{picture}">'

    def to_frame(self) -> pandas.DataFrame:
        """A row an epoch and peer, of both runs where there are two (column `run`): losses in nats,
        scores as fractions under test_NAME or validation_NAME, what holds for all peers alike in
        each of their rows. Matrices of pairs stay in `history`. Raises MissingExtra without
        pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise MissingExtra("pandas is not installed: pip install pandas") from None
        rows = []
        runs = {"mutual": self}
        if self.independent:
            runs["independent"] = self.independent
        for run, result in runs.items():
            for record in result.history:
                values = {n: v for n, v in record.items() if n not in (*IMAGES, "pairwise_kl")}
                for images in IMAGES:
                    scores = record.get(images, {}).items()
                    values |= {f"{images}_{name}": value for name, value in scores}
                for k, peer in enumerate(result.peers):
                    own = {n: v[k] if isinstance(v, list) else v for n, v in values.items()}
                    rows.append({"run": run, "peer": peer, **own})
        return pandas.DataFrame(rows)

    def _rows(self) -> list[tuple[str, ...]]:
        """A row a peer below the columns' names: scores, or where nothing was evaluated the last
        epoch's training losses."""
        columns = [
            ("peer", list(self.peers)),
            ("parameters", [f"{count:,}" for count in self.parameters]),
        ]
        together: list[list[str]] = []  # a row an ensemble
        runs = {"mutual": self.headline}
        if self.independent:
            runs = {"independent": self.independent.headline, **runs}
        if self.scores is None:
            last = self.history[-1]
            columns += [
                (label, [f"{value:.4f}" for value in last[key]])
                for key, label in LOSSES.items()
                if key in last
            ]
        else:
            for score in scoring_of(self.scores).headlines:
                for run, scores in runs.items():
                    label = f"{score.label} %" + (f" {run}" if len(runs) > 1 else "")
                    values = getattr(scores, score.name)
                    columns.append((label, [percent(x) for x in values]))
                    found = ensembles(dataclasses.asdict(scores))
                    together = together or [[name, ""] for name, _ in found]
                    for row, (_, own) in zip(together, found, strict=True):
                        row.append(percent(own[score.name]))
        rows = list(zip(*([label, *values] for label, values in columns), strict=True))
        return [*rows, *map(tuple, together)] if len(self.peers) > self.config.groups else rows

    def _ranks(self) -> str:
        return f", each of {self.mesh['ranks']} ranks" if self.mesh else ""

    def _note(self) -> str:
        best = f", best epoch {self.best_epoch:.4g}" if self.best_epoch else ""
        if self.chosen_on == "validation":
            best = (
                f", {self.scored_on} scores of epoch {self.best_epoch:.4g}, which validation chose"
            )
        if self.stopped:
            best += f", stopped early: {self.stopped}"
        rate = f", {self.images_per_second:,.0f} images/s" if self.images_per_second else ""
        epochs = self.history[-1]["epoch"]
        if self.images and self.images["unlabelled"]:
            best += f", {self.images['labelled']:,} images with labels and "
            best += f"{self.images['unlabelled']:,} without"
        return (
            f"{epochs:.4g} epoch{'s' * (epochs != 1)}{best}, {self.seconds:,.0f} s{rate}, "
            f"{self.precision} on {self.device}{self._ranks()}; run folder: {self.folder}"
        )
