"""`--dry-run`: one real step in memory, then a description of the run. Writes nothing."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from fastdml.devices import device_name
from fastdml.report.loggers import TABLE
from fastdml.report.predictions import PREDICTIONS
from fastdml.train.checkpoint_folder import CHECKPOINTS
from fastdml.train.predictions import Scorer
from fastdml.train.run_folder import LAST_CHECKPOINT, run_name
from fastdml.train.teacher_cache import TABLES
from fastdml.train.unlabelled import image_counts
from fastdml.units import size

if TYPE_CHECKING:
    from fastdml.train.trainer import Trainer


def plan(trainer: Trainer) -> str:
    """Runs the first step of `trainer`, which changes its peers' weights, and describes the run."""
    config, cohort, progress = trainer.config, trainer.cohort, trainer.progress
    cohort.train()
    batch = next(trainer.batches(0))
    choice = trainer.choose(batch)
    started = time.perf_counter()
    losses = trainer.ranks.whole(trainer.step(*batch)).losses.tolist()
    seconds = time.perf_counter() - started
    peers = zip(cohort.names, trainer.parameters(), losses, strict=True)
    whole = trainer.ranks.rows(len(batch[-1]), trainer.train)
    phases = 2 if config.independent else 1
    epochs = f"{progress.epochs} epoch" + "s" * (progress.epochs != 1)
    folder = config.folder or f"runs/{run_name(config)}-NNN, the next free number"
    rows = [
        ("dry run", "nothing was written"),
        *(
            (f"peer {k}", f"{name}, {count:,} parameters, loss of the first step {loss:.4f}")
            for k, (name, count, loss) in enumerate(peers)
        ),
        *((f"teacher {t}", f"{one.name}, frozen") for t, one in enumerate(cohort.teachers)),
        (
            "device",
            f"{device_name(trainer.device, choice.threads)}, {trainer.amp.name}, "
            f"{config.update} updates",
        ),
        ("execution", trainer.step.name),
        (
            "steps",
            f"{trainer.steps:,} an epoch of {whole} images, {epochs}, "
            f"{progress.total * phases:,} in all" + (" (mutual and independent)" * (phases - 1)),
        ),
        *_images(trainer),
        ("first step", f"{seconds:.2f} s, start-up included"),
        ("memory", _memory(trainer.device)),
        ("run folder", folder + (" (resumed)" if config.resume else "")),
        ("files", " ".join(_files(trainer))),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _images(trainer: Trainer) -> list[tuple[str, str]]:
    """How many training images have labels, where some have none."""
    found = image_counts(trainer.train)
    if not found or not found["unlabelled"]:
        return []
    return [("images", f"{found['labelled']:,} with a label, {found['unlabelled']:,} without")]


def _memory(device: torch.device) -> str:
    """The peak memory use of the process, or of the CUDA device, so far."""
    if device.type == "cuda":
        return f"{size(torch.cuda.max_memory_allocated(device))} on the device at most"
    # ru_maxrss is in kilobytes, on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{size(peak)} of this process at most, the data included"


def _files(trainer: Trainer) -> list[str]:
    """The files that the run's folder would hold."""
    config = trainer.config
    state = [v for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    held = sum(v.nbytes for v in (*trainer.cohort.state_dict().values(), *state))
    saved = f"{LAST_CHECKPOINT} ({size(held)})"
    if trainer.mesh is not None:
        saved = f"{CHECKPOINTS}/"  # most of it belongs to peers elsewhere
    files = ["config.yaml", "metrics.jsonl", saved, "cohort.json", "peers/"]
    files += ["best/"]
    files += [f"{stem}.{kind}" for kind in config.figures for stem in ("curves", "pairwise_kl")]
    files += ["summary.json"]
    scorers = (trainer.evaluations.during, trainer.evaluations.at_end)
    if any(isinstance(scorer, Scorer) for scorer in scorers):
        files += [PREDICTIONS]
    if config.tensorboard:
        files += ["tensorboard/"]
    if config.cache_teachers:
        files += [TABLES]
    if config.csv:
        files += [TABLE]
    if config.independent:
        files += ["initial.ckpt", "independent/"]
    return files
