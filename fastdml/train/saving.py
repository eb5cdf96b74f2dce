"""Where a training saves what it goes on from, and how it finds that again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdml.train import checkpoint
from fastdml.train.run_folder import LAST_CHECKPOINT
from fastdml.train.trainer_state import restore, state_of

if TYPE_CHECKING:
    from fastdml.train.trainer import Trainer


class LastCheckpoint:
    """One file, last.ckpt, which each save replaces."""

    failed = False  # whether a save that goes on beside training has met an error

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def path(self) -> Path:
        return self.trainer.folder / LAST_CHECKPOINT

    def found(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.path.is_file()

    def restore(self) -> None:
        """Goes on from it: see `trainer_state.restore`."""
        restore(self.trainer)

    def save(self) -> None:
        """Replaces the checkpoint. Raises InputError where it cannot be written."""
        checkpoint.save(self.path, state_of(self.trainer))

    def wait(self) -> None:
        """Returns when the last save is on disk."""


def checkpoints_of(trainer: Trainer) -> LastCheckpoint:
    """What saves this training."""
    return LastCheckpoint(trainer)
