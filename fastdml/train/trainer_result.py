"""The end of a training: its last weights on disk, and its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdml.devices import device_name
from fastdml.train.result import TrainResult
from fastdml.train.run_folder import BEST
from fastdml.train.saving import save_cohort
from fastdml.train.unlabelled import image_counts

if TYPE_CHECKING:
    from fastdml.train.trainer import Trainer


def result_of(trainer: Trainer) -> TrainResult:
    """Writes the last weights, where Cohort.load finds them; with `ema` their averages."""
    progress = trainer.progress
    tested, validated = progress.tested or {}, progress.images == "validation"
    trainer.ranks.keep_averages(trainer.cohort, trainer.ema)
    if trainer.ema:
        trainer.ema.copy_to_cohort()
    save_cohort(trainer.cohort, trainer.mesh, trainer.folder)
    weights = {"last": trainer.folder}
    if progress.best_scores:
        weights["best"] = trainer.folder / BEST
    return TrainResult(
        folder=trainer.folder,
        config=trainer.config,
        peers=tuple(trainer.cohort.names),
        parameters=trainer.parameters(),
        history=progress.history,
        scores=tested.get("last", progress.scores),
        best_epoch=progress.best_epoch,
        best_scores=tested.get("best", progress.best_scores),
        chosen_on=progress.images if progress.best_scores else None,
        validation_scores=progress.scores if validated else None,
        best_validation_scores=progress.best_scores if validated else None,
        weights=weights,
        images_per_second=trainer.clock.images_per_second,
        data_wait=trainer.clock.data_wait,
        seconds=progress.elapsed(),
        skipped_steps=progress.position - int(trainer.schedule.updates),
        device=device_name(trainer.device, trainer.choice and trainer.choice.threads),
        precision=trainer.amp.name,
        execution=trainer.execution,
        threads=trainer.choice and trainer.choice.threads,
        images=image_counts(trainer.train),
        stopped=progress.stopped,
        teachers=tuple(trainer.cohort.taught_by),
        mesh=trainer.ranks.described(trainer),
    )
