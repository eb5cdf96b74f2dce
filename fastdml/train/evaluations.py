"""What a training evaluates its peers on: during it, and at its end.

With validation images these choose the best weights and end a training that no longer gets better;
the test set is read once, at the end, for the last and for the best weights. Without them the test
images do both, and the best scores are flattered by it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastdml import cohort_files, parallel
from fastdml.cohort import Cohort
from fastdml.data.loaders.batching import Batching
from fastdml.engine.amp import Amp
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.parallel import shards
from fastdml.report.metrics_log import read_metrics
from fastdml.train import checks
from fastdml.train.batches import Batches, as_batches
from fastdml.train.config.base import TrainConfig
from fastdml.train.own_batches import ArrayBatches
from fastdml.train.predictions import Scorer, save_predictions
from fastdml.train.progress import Images
from fastdml.train.run_folder import BEST
from fastdml.train.same_data import Marks, data_mark
from fastdml.train.tasks.task import Evaluate, Task

if TYPE_CHECKING:
    from fastdml.train.trainer import Trainer


class Evaluations(NamedTuple):
    during: Evaluate | None  # each `eval_every` epochs; chooses the best weights
    images: Images = "test"  # that `during` reads
    at_end: Evaluate | None = None  # reads the test images, where `during` reads others
    marks: Marks = MappingProxyType({})  # what tells these images from others, by their use


def evaluations(
    task: Task, cohort: Cohort, validation: Any, test: Any, config: TrainConfig, amp: Amp
) -> Evaluations:
    """validation, test: batches, or what gives a cohort's scores, or None. Batches are looked at
    first. Raises InputError for such as the peers cannot be evaluated on."""
    marks: dict[str, str | None] = {}
    on_test = _evaluate(task, cohort, test, "test", config, amp, marks)
    if validation is None:
        if config.patience:
            raise InputError(
                f"patience={config.patience} needs validation images, which say when to stop: set "
                "validation, or patience to 0"
            )
        return Evaluations(on_test, marks=marks)
    during = _evaluate(task, cohort, validation, "validation", config, amp, marks)
    return Evaluations(during, "validation", on_test, marks)


def _evaluate(
    task: Task,
    cohort: Cohort,
    source: Any,
    what: Images,
    config: TrainConfig,
    amp: Amp,
    marks: dict[str, str | None],
) -> Evaluate | None:
    """A function from a cohort to its scores. marks: gets what tells the batches from others."""
    if source is None or callable(source):
        return source
    batches: Batches = as_batches(
        *(source, amp.device, cohort.num_classes, what, task.check_labels),
        batch_size=config.batch_size,
    )
    labels = checks.test_look(cohort, batches, config, amp, what)
    marks[what] = data_mark(batches)
    scorer = task.scorer(batches, amp)
    if isinstance(scorer, Scorer):
        if isinstance(batches, (Batching, ArrayBatches)):
            labels = batches.labels  # of all batches
        checks.all_labelled(labels, what)
    return scorer


def read_test_set(trainer: Trainer) -> None:
    """Scores the last and the best weights on the test images, where validation images chose the
    best, and saves the scores, unless that was done before."""
    progress, evaluate = trainer.progress, trainer.evaluations.at_end
    if evaluate is None:
        return
    if progress.tested is None:
        progress.tested = _last_and_best(trainer, evaluate)
        # Before the checkpoint: from then on the test set is not read again.
        with concluding():
            keep_predictions(trainer)
        trainer.save()
    # After the checkpoint: a run that is killed before both are logged does it when it is resumed.
    end = ("test", progress.position)
    found = [r for r in read_metrics(trainer.folder) if (r["kind"], r["step"]) == end]
    logged = {record.get("weights") for record in found}
    for weights, scores in progress.tested.items():
        if weights not in logged:
            values = dataclasses.asdict(scores)
            trainer.log.log(*end, progress.trained, weights=weights, **values)


@contextmanager
def concluding() -> Iterator[None]:
    """Says with an error in what follows training that resuming does no training again."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{error}; the peers are trained and saved, resume does the rest"
        ) from error


def _last_and_best(trainer: Trainer, evaluate: Evaluate) -> dict[str, Any]:
    """The test scores of the last weights and, scored last, of the best ones."""
    cohort, progress = trainer.cohort, trainer.progress
    with scoring_weights(trainer):
        last = scored(evaluate, cohort)
    if progress.best_epoch == progress.trained:
        return {"last": last, "best": last}
    trained = {key: value.clone() for key, value in cohort.state_dict().items()}
    try:
        load_into(cohort, trainer.folder / BEST, trainer.device)
        with evaluating(cohort):
            return {"last": last, "best": scored(evaluate, cohort)}
    finally:
        cohort.load_state_dict(trained)


@contextmanager
def scoring_weights(trainer: Trainer) -> Iterator[None]:
    """Inside, the cohort has the weights that are scored, and saved where they are the best: the
    averages of `ema`, and on a mesh the running statistics of all columns. It is in evaluation
    mode."""
    cohort, mesh = trainer.cohort, trainer.cohort.mesh
    with (
        trainer.ema.applied() if trainer.ema else nullcontext(),
        nullcontext() if mesh is None else parallel.averaged_statistics(cohort, mesh),
        evaluating(cohort),
    ):
        yield


def scored(evaluate: Evaluate, cohort: Cohort) -> Any:
    """The cohort's scores. On a mesh all ranks call it and get the same; a function of the user's
    reads all its data on each of them, and gets the logits of all peers."""
    mesh = cohort.mesh
    if mesh is None or getattr(evaluate, "shares_ranks", False):
        return evaluate(cohort)
    with parallel.answering(cohort):
        scores = evaluate(cohort)
    texts = mesh.gather(json.dumps(dataclasses.asdict(scores), default=str, sort_keys=True))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise InputError(
                f"the function that scores the cohort says something else on rank {rank} than on "
                "rank 0: it must read the same data in the same order and draw nothing, or give "
                "batches in its place"
            )
    return scores


def load_into(cohort: Cohort, folder: Path, device: torch.device) -> None:
    """Puts the weights of a saved cohort into this one, on a mesh into the peers that are here."""
    if cohort.mesh is None:
        Cohort.load(folder, device, peers=list(cohort.peers))
        return
    entries = cohort_files.read_description(folder / "cohort.json")["peers"]
    for k in cohort.mesh.local:
        peer, name = cohort.peers[k], cohort.names[k]
        weights, path = cohort_files.read_peer(folder, k, entries[k])
        if shards.is_sharded(peer):
            shards.load_weights(peer, weights.items())
        else:
            cohort_files.load_peer(peer, name, weights, path)


def keep_predictions(trainer: Trainer) -> None:
    """Saves what was said of each image that the run's reported scores are of."""
    evaluate = trainer.evaluations.at_end
    if evaluate is None:
        save_predictions(trainer.folder, trainer.cohort, trainer.evaluations.during)
    elif isinstance(evaluate, Scorer) and evaluate.rows is not None:  # read by this process
        save_predictions(trainer.folder, trainer.cohort, evaluate, weights="best")
