"""Where a training saves what it goes on from, and how it finds that again.

Without a mesh it is one file, last.ckpt, written between two steps. On a mesh each save is a folder
that all ranks write into beside training: at the step a copy on the host is taken, which costs the
step's time for that copy; a thread writes it and waits for the other ranks' threads, and rank 0
writes the manifest, from which on the checkpoint counts. The copies from CUDA devices, in pinned
memory, have not run on one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdml import cohort_files
from fastdml.cohort import Cohort
from fastdml.errors import InputError, one_line
from fastdml.files import Staged, writing
from fastdml.parallel import RankLost, averaged_statistics
from fastdml.parallel.failure import of_collective
from fastdml.parallel.shard_files import divided, write
from fastdml.parallel.shards import is_sharded, whole_weights
from fastdml.paths import expanded
from fastdml.train import checkpoint, checkpoint_folder
from fastdml.train.checkpoint_folder import CHECKPOINTS, RUN, Manifest, Mark, whole_folders
from fastdml.train.checkpoint_reading import (
    Reader,
    checkpoints,
    fallen_back,
    read,
    read_newest,
    written_with,
)
from fastdml.train.config.base import TrainConfig
from fastdml.train.run_folder import LAST_CHECKPOINT
from fastdml.train.trainer_state import peer_state, rank_state, restore, run_state, state_of

if TYPE_CHECKING:
    from fastdml.parallel import Mesh
    from fastdml.train.trainer import Trainer

logger = logging.getLogger(__name__)

KEPT = " (the one before it is kept)"
FINISHING = 30.0  # seconds that an error waits at most for the save under way


class LastCheckpoint:
    """One file, last.ckpt, which each save replaces."""

    failed = False  # whether a save that goes on beside training has met an error

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def path(self) -> Path:
        """Of the last save, for messages."""
        return self.trainer.folder / LAST_CHECKPOINT

    def found(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(checkpoints(self.trainer.folder))

    def restore(self) -> None:
        """Goes on from the newest one. Raises InputError where none is of this run and whole."""
        found = read_newest(self.trainer.folder)
        if found is None:
            raise InputError(f"there is no checkpoint {self.path}")
        for damaged in found.damaged:
            checkpoint_folder.set_aside(damaged)
        restore(self.trainer, found.state, found.path)

    def save(self) -> None:
        """Replaces the checkpoint. Raises InputError where it cannot be written."""
        checkpoint.save(self.path, state_of(self.trainer))

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises InputError where it could not be
        written."""

    def finished(self) -> nullcontext[None]:
        """Nothing goes on beside training."""
        return nullcontext()


class FolderCheckpoints:
    """A folder a save, written by all ranks of a mesh, the last few of which are kept, and that of
    the best weights. All ranks call each method at the same step."""

    def __init__(self, trainer: Trainer, mesh: Mesh, keep: int) -> None:
        self.trainer, self.mesh, self.keep = trainer, mesh, keep
        self.last: Path | None = None  # the last one saved or restored
        self.best: int | None = None  # the step of the best weights
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None  # that the thread has met
        self.group: Any = None  # of all ranks, for the threads alone
        self.row_group: Any = None  # of those that have the same peers, as well

    @property
    def path(self) -> Path:
        return self.last or self.trainer.folder / CHECKPOINTS

    @property
    def failed(self) -> bool:
        return self.error is not None

    def found(self) -> bool:
        found = self._candidates()
        if not found and self.mesh.lead:
            checkpoint_folder.remove_partial(self.trainer.folder)
        return bool(found)

    def _candidates(self) -> list[Path]:
        run = self.trainer.folder
        names = [str(p.relative_to(run)) for p in checkpoints(run)] if self.mesh.lead else None
        return [run / name for name in self.mesh.share(names)]

    def restore(self) -> None:
        """Goes on from the newest one whose files are whole on every rank that reads them."""
        reasons: list[str] = []
        damaged: list[Path] = []
        for path in self._candidates():
            state, error = None, None
            try:
                state = read(path, Reader.on(self.mesh), dict(enumerate(self.trainer.cohort)))
            except InputError as caught:
                error = str(caught)
            errors = [text for text in self.mesh.gather(error) if text]
            if state is not None and not errors:
                break
            reasons.append(errors[0])
            damaged.append(path)
        else:
            raise InputError(reasons[0])
        if self.mesh.lead:
            if damaged:
                logger.warning(fallen_back(reasons, path))
            for folder in damaged:
                checkpoint_folder.set_aside(folder)
            checkpoint_folder.remove_partial(self.trainer.folder)
        restore(self.trainer, state, path)
        self.last = path

    def save(self) -> None:
        """Takes a copy and has it written. Waits for the save before. Raises InputError where that
        one could not be written."""
        self.wait()
        trainer, mesh = self.trainer, self.mesh
        folder = self._new_folder()
        files = {checkpoint_folder.rank_name(mesh.rank): on_host(rank_state(trainer))}
        shards: dict[str, Any] = {}
        with averaged_statistics(trainer.cohort, mesh, trainer.ema):
            for k in mesh.local:
                name = checkpoint_folder.peer_name(k, trainer.cohort.names[k])
                state = peer_state(trainer, k)
                if is_sharded(trainer.cohort.peers[k]):
                    state, parts = divided(state)
                    shards[name] = on_host(parts)
                if mesh.column == 0:
                    files[f"{name}.ckpt"] = on_host(state)
        if mesh.lead:
            own = {"rows": list(mesh.rows), "with_ema": trainer.ema is not None}
            files[RUN] = on_host({**run_state(trainer), **own})
        copied = None
        if mesh.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(mesh.device))
        whole = Manifest(
            folder,
            trainer.progress.position,
            mesh.peer,
            mesh.data,
            trainer.config.accumulate,
            {},
        )
        if self.group is None:
            self.group, self.row_group = mesh.new_control(), mesh.new_row_control()
        begun = self.last is not None
        self.last, self.best = folder, trainer.progress.best_step
        self.thread = threading.Thread(
            target=self._write, args=(whole, files, shards, copied), name="checkpoint", daemon=True
        )
        self.thread.start()
        if not begun:  # a run with results always has a checkpoint
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is whole. Raises InputError, the same on all ranks, where one
        could not write."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error

    @contextmanager
    def finished(self) -> Iterator[None]:
        """An error that leaves this block waits for the save under way, which the threads of all
        ranks finish though training does not go on; not where a rank is lost."""
        try:
            yield
        except Exception as error:
            lost = isinstance(error, RankLost) or of_collective(error)
            if self.thread is not None and not lost:
                self.thread.join(FINISHING)
            raise

    def _new_folder(self) -> Path:
        """Made by rank 0, and by every rank that does not see it yet."""
        run, step, name = self.trainer.folder, self.trainer.progress.position, None
        if self.mesh.lead:
            places = map(checkpoint_folder.place, checkpoint_folder.checkpoint_folders(run))
            saves = [place[1] for place in places if place and place[0] == step]
            name = checkpoint_folder.folder_name(step, max(saves, default=0) + 1)
        return run / CHECKPOINTS / self.mesh.share(name)

    def _write(
        self, whole: Manifest, files: dict[str, Any], shards: dict[str, Any], copied: Any
    ) -> None:
        """In the thread. Every rank ends with the same `error`, or none."""
        try:
            if copied is not None:
                copied.synchronize()
            written = self._written(whole.folder, files, shards)
            outcomes = self.mesh.gather(written, self.group)
            error = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
            if error is None and self.mesh.lead:
                error = self._complete(whole, outcomes)
            if error is not None and self.mesh.lead:
                checkpoint_folder.remove(whole.folder)
            if error := self.mesh.share(error, self.group):
                self.error = InputError(error)
        except Exception as error:  # of a collective, most of all: another rank is gone
            self.error = error

    def _written(
        self, folder: Path, files: dict[str, Any], shards: dict[str, Any]
    ) -> dict[str, Mark] | str:
        """The marks of this rank's files, or why they could not be written."""
        others = [p for p in whole_folders(self.trainer.folder) if p != folder]
        marks: dict[str, Mark] = {}
        try:
            for name, parts in shards.items():  # first, where all ranks of a row are sure to come
                write(folder / name, parts, self.row_group)
            for name in shards if self.mesh.column == 0 else ():
                marks |= checkpoint_folder.marks_below(folder, name)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            kept = KEPT if others else ""
            for name, state in files.items():
                marks[name] = checkpoint.save_marked(folder / name, state, kept)
            return marks
        except InputError as error:
            return str(error)
        except Exception as error:
            return one_line(error)

    def _complete(self, whole: Manifest, outcomes: list[dict[str, Any]]) -> str | None:
        for marks in outcomes:
            whole.files.update({name: Mark(*mark) for name, mark in marks.items()})
        try:
            checkpoint_folder.write_manifest(whole)
            checkpoint_folder.remove_old(self.trainer.folder, self.keep, self.best)
        except InputError as error:
            return str(error)
        except Exception as error:  # which the other ranks wait for
            return one_line(error)
        return None


def checkpoints_of(trainer: Trainer) -> LastCheckpoint | FolderCheckpoints:
    """What saves this training."""
    if trainer.mesh is None:
        return LastCheckpoint(trainer)
    return FolderCheckpoints(trainer, trainer.mesh, trainer.config.keep_checkpoints)


def accumulate_on(folder: Path, config: TrainConfig, mesh: Mesh | None) -> TrainConfig:
    """The settings to go on with where a batch is to have as many parts as before: BatchNorm sees
    them one at a time. A column of the mesh is a part, and `accumulate` makes more of it, so that
    this follows the mesh. Raises InputError where it cannot."""
    found = written_with(folder)
    if found is None or (mesh is None and not whole_folders(folder)):
        return config
    was, columns = found
    data = 1 if mesh is None else mesh.data
    parts = was if config.sync_batchnorm else was * columns
    own = 1 if config.sync_batchnorm else data  # of a batch, made by the columns
    if config.sync_batchnorm and was > 1 and columns != data:
        raise InputError(
            f"cannot resume on data={data}: with sync_batchnorm and accumulate={was} BatchNorm saw "
            f"parts of a batch that only data={columns} makes again"
        )
    if parts % own:
        raise InputError(
            f"cannot resume on data={data}: a batch of this run has {parts} parts (accumulate="
            f"{was}, data={columns}), each of which BatchNorm sees by itself: choose data so that "
            f"it divides {parts}, or start a new run in another folder"
        )
    if parts // own != config.accumulate:
        logger.info(
            "accumulate=%d with data=%d: a batch has %d parts, as before (accumulate=%d, data=%d)",
            *(parts // own, data, parts, was, columns),
        )
    return config.replace(accumulate=parts // own)


def save_cohort(cohort: Cohort, mesh: Mesh | None, folder: Path) -> None:
    """As `Cohort.save`, of a cohort whose peers are on the ranks of a mesh: each is written where
    it is, by column 0, and cohort.json by rank 0 when all are. A sharded peer is made whole on
    column 0's host. All ranks call it. Raises InputError on all, where one cannot write."""
    if mesh is None:
        cohort.save(folder)
        return
    folder, staged, digests = expanded(folder), Staged(), {}

    def stage(k: int, weights: dict[str, Tensor]) -> None:
        digests[k] = cohort_files.stage_peer(k, cohort.names[k], weights, folder, staged)

    def describe() -> None:
        with Staged() as last:
            cohort_files.stage_description(cohort, digests, folder, last)

    unfit = _attempt(folder, lambda: cohort_files.check_savable(cohort, shards=True))
    failed = None
    for k in () if unfit else mesh.local:  # unfit are peers in all columns or in none
        peer = cohort.peers[k]
        weights = whole_weights(peer) if is_sharded(peer) else peer.state_dict()
        if mesh.column == 0 and weights is not None and failed is None:
            failed = _attempt(folder, partial(stage, k, weights))
    errors = mesh.gather(unfit or failed)
    errors += mesh.gather(_attempt(folder, lambda: staged.close(not any(errors))))
    for found in mesh.gather({str(k): digest for k, digest in digests.items()}):
        digests |= {int(k): digest for k, digest in found.items()}
    fine = not any(errors)
    errors.append(mesh.share(_attempt(folder, describe) if fine and mesh.lead else None))
    if error := next(filter(None, errors), None):
        raise InputError(error)


def _attempt(folder: Path, action: Callable[[], None]) -> str | None:
    """Why it could not be done, if so, for the other ranks to know."""
    try:
        with writing(folder):
            action()
    except InputError as error:
        return str(error)
    return None


def on_host(value: Any) -> Any:
    """A copy that training does not change, on the host. Of tensors on a CUDA device the copy is
    in pinned memory, and there when what the current stream was given before has run."""
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        copy = torch.empty_like(value, device="cpu", pin_memory=True)
        return copy.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: on_host(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(on_host, value))
    return value
