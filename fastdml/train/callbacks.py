"""Callbacks: what a training calls at the start and at the end of each epoch, after each
evaluation, and at its own end.

The checkpoint is on disk before the methods of an epoch are called, so that a callback that raises
loses nothing: its error ends the run with its own traceback, and `resume` goes on with the epoch
after it. A resumed run does not call again for what it had called for before. torch's random
generators are after a call what they were before it, so that a callback changes no training.

On a mesh they are called on rank 0 alone, once for all ranks: what they return and the weights of
peers that they set are everybody's.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastdml.errors import InputError
from fastdml.train.tasks.task import scoring_of

if TYPE_CHECKING:
    from fastdml.train.result import TrainResult
    from fastdml.train.trainer import Trainer

logger = logging.getLogger(__name__)

METHODS = ("on_epoch", "on_evaluation", "on_end")  # that a callback must have


@dataclass(frozen=True)
class Event:
    """Where a training stands: plain values."""

    run: Literal["mutual", "independent"]
    folder: Path  # of this training; that of the independent one is within the mutual one's
    peers: tuple[str, ...]  # display names, in the order of all lists
    epoch: float  # epochs trained; after a last one cut short, a fraction
    epochs: int  # of the whole training
    step: int  # steps done
    steps: int  # of the whole training
    seconds: float  # since training began, over all resumptions
    seconds_left: float | None  # of the run, an estimate; None where it cannot be told


@dataclass(frozen=True)
class EpochStartEvent(Event):
    """The start of an epoch; `epoch` is the number of those before it."""

    losses: Mapping[str, list[float]] | None  # of the epoch before, as `EpochEvent` has them
    networks: int  # L: the peers and after them their teachers, which an independent run lacks
    set_peer_weights: Callable[[Any], None] = field(repr=False)
    """Whom peers learn from, from here on: (L, L), not negative, row k how much network k learns
    from each; neither the diagonal nor the rows of teachers are used. It is `peer_weights` of
    `fastdml.mutual_loss`, in place of an equal share of each, and part of the checkpoint. Every
    execution follows it, and none captures anew. Raises InputError for another shape, and for
    values that are negative or not finite, and where peers are in groups."""


@dataclass(frozen=True)
class EpochEvent(Event):
    """The end of an epoch."""

    losses: Mapping[str, list[float]]
    """Means over the epoch, a value a peer, in nats: "loss" is their weighted sum, "ce" the
    cross-entropy, "kl" the divergence from the other peers, "metric" the loss on features."""
    lr: float
    images_per_second: float  # of training alone; 0 if too short to tell
    data_wait: float  # share of that time spent waiting for batches, 0 to 1
    record: Mapping[str, Any]  # all that metrics.jsonl says of the epoch


@dataclass(frozen=True)
class EvaluationEvent(Event):
    """The scores of an evaluation."""

    data: Literal["validation", "test"]  # that the peers were evaluated on
    scores: Mapping[str, Any]  # as in metrics.jsonl: a list of a value a peer, and ensemble_NAME
    mean: float  # of the leading score (top-1 or mAP) over the peers, a fraction of 1
    best: bool  # whether it is the highest mean so far
    best_epoch: float


@dataclass(frozen=True)
class EndEvent(Event):
    """The end of a training; its weights are saved."""

    stopped: str | None  # why training ended early; None where it went to its end
    chosen_on: Literal["validation", "test"] | None  # the images that chose the best weights
    scores: Mapping[str, Any] | None  # of the last weights; None where nothing was evaluated
    best_scores: Mapping[str, Any] | None
    best_epoch: float
    weights: Mapping[str, Path]  # "last" and "best": folders that Cohort.load reads


class Callback:
    """The base of callbacks, which override what they need; any object with these methods serves.

    Each is called for the mutual training and, with `independent`, for the other one too:
    `event.run` says which. To stop a training return a text, the reason, from `on_epoch` or
    `on_evaluation`: it is evaluated, saved and summed up as at its end. The independent training
    still follows a mutual one that is stopped.
    """

    def on_epoch_start(self, event: EpochStartEvent) -> None:
        """Before the first step of each epoch; not where a resumed run goes on within one, which
        has what was set at its start."""

    def on_epoch(self, event: EpochEvent) -> str | None:
        """After each epoch and its checkpoint."""
        return None

    def on_evaluation(self, event: EvaluationEvent) -> str | None:
        """After each evaluation during training, before `on_epoch` of the same epoch."""
        return None

    def on_end(self, event: EndEvent) -> None:
        """Once, after the weights of a training are saved; not after a signal."""


def check_callbacks(callbacks: Sequence[Any]) -> tuple[Any, ...]:
    """`callbacks` as a tuple. Raises InputError for what is no sequence of callbacks."""
    if not isinstance(callbacks, (list, tuple)):
        raise InputError(f"callbacks must be a list, not a {type(callbacks).__name__}")
    for one in callbacks:
        missing = [name for name in METHODS if not callable(getattr(one, name, None))]
        if missing or isinstance(one, type):
            what = f"the class {one.__name__}" if isinstance(one, type) else repr(one)
            raise InputError(
                f"callbacks has {what}, which is no callback: give objects of subclasses of "
                "fastdml.train.Callback"
            )
    return tuple(callbacks)


def _losses(record: Mapping[str, Any]) -> dict[str, list[float]]:
    return {n: record[n] for n in ("loss", "ce", "kl", "metric") if n in record}


class Calls:
    """The callbacks of a training, called with its events."""

    def __init__(self, trainer: Trainer, callbacks: Sequence[Any]) -> None:
        self.trainer, self.callbacks = trainer, callbacks

    def epoch_start(self) -> None:
        history = self.trainer.progress.history
        weights: list[Tensor] = []

        def called() -> list[Any] | None:
            self._call(
                "on_epoch_start",
                EpochStartEvent,
                losses=_losses(copy.deepcopy(history[-1])) if history else None,
                networks=self._networks,
                set_peer_weights=lambda given: weights.append(self._checked(given)),
            )
            return weights[-1].tolist() if weights else None

        chosen = self.trainer.ranks.decided(called)
        if chosen is not None:
            self._set_peer_weights(torch.tensor(chosen))

    @property
    def _networks(self) -> int:
        return len(self.trainer.cohort) + len(self.trainer.cohort.teachers)

    def _checked(self, weights: Any) -> Tensor:
        size, groups = self._networks, self.trainer.cohort.groups
        if groups > 1:
            raise InputError(
                f"peer weights of a run of {groups} groups, which learn from nobody outside: leave "
                "groups out"
            )
        wanted = (
            f"give a matrix ({size}, {size}) of numbers from 0 on, row k how much network k learns "
            "from each"
        )
        try:
            given = torch.as_tensor(weights, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"peer weights, a {type(weights).__name__}: {wanted}") from error
        if given.shape != (size, size) or not (given.isfinite() & (given >= 0)).all():
            raise InputError(f"peer weights {tuple(given.shape)}: {wanted}")
        return given

    def _set_peer_weights(self, given: Tensor) -> None:
        trainer, loss = self.trainer, self.trainer.loss
        if loss.peer_weights is None:
            loss.peer_weights = given.to(trainer.device, copy=True)
        else:  # in place, where a captured graph reads it
            loss.peer_weights.copy_(given)

    def epoch(self, record: Mapping[str, Any]) -> str | None:
        """The reason to stop that a callback gives, if one does; all are called."""
        record = copy.deepcopy(record)  # the run's own stays as it is, whatever is done to this one
        return self._decided(
            "on_epoch",
            EpochEvent,
            losses=_losses(record),
            **{n: record[n] for n in ("lr", "images_per_second", "data_wait")},
            record=record,
        )

    def evaluation(self, scores: Any) -> str | None:
        """As `epoch`."""
        progress = self.trainer.progress
        return self._decided(
            "on_evaluation",
            EvaluationEvent,
            data=progress.images,
            scores=dataclasses.asdict(scores),
            mean=scoring_of(scores).mean(scores),
            best=progress.best_epoch == progress.trained,
            best_epoch=progress.best_epoch,
        )

    def end(self, result: TrainResult) -> None:
        scores, best = (s and dataclasses.asdict(s) for s in (result.scores, result.best_scores))
        self._decided(
            "on_end",
            EndEvent,
            stopped=result.stopped,
            chosen_on=result.chosen_on,
            scores=scores,
            best_scores=best,
            best_epoch=result.best_epoch,
            weights=result.weights,
        )

    def _decided(self, name: str, kind: type[Event], **values: Any) -> str | None:
        """On a mesh the lead's callbacks alone are called, and decide for all ranks."""
        return self.trainer.ranks.decided(lambda: self._call(name, kind, **values))

    def _call(self, name: str, kind: type[Event], **values: Any) -> str | None:
        if not self.callbacks:
            return None
        trainer, progress = self.trainer, self.trainer.progress
        event = kind(
            run=trainer.label,  # type: ignore[arg-type]
            folder=trainer.folder,
            peers=tuple(trainer.cohort.names),
            epoch=progress.trained,
            epochs=progress.epochs,
            step=progress.position,
            steps=progress.total,
            seconds=progress.elapsed(),
            seconds_left=progress.seconds_left,
            **values,
        )
        # What they draw is not drawn from what the peers draw from: training goes on as without
        # them, and as a resumed run does.
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            called = [one for one in self.callbacks if hasattr(one, name)]
            reasons = [self._reason(callback, name, event) for callback in called]
        return next((reason for reason in reasons if reason is not None), None)

    def _reason(self, callback: Any, name: str, event: Event) -> str | None:
        what = f"{type(callback).__name__}.{name}"
        try:
            reason = getattr(callback, name)(event)
        except Exception as error:  # whatever the user's code may raise; it keeps its traceback
            logger.error(
                "%s raised %s; all %d steps are saved: resume goes on after them",
                what,
                type(error).__name__,
                event.step,
            )
            raise
        if reason is not None and name == "on_epoch_start":
            raise InputError(
                f"{what} returned {reason!r}: return nothing; on_epoch and on_evaluation stop a "
                "training"
            )
        if reason is not None and not isinstance(reason, str):
            raise InputError(
                f"{what} returned {reason!r}: return None to go on, or a text, the reason, to stop "
                "the training"
            )
        return reason
