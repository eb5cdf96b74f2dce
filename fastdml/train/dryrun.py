"""`--dry-run`: one real step in memory, then what the run would be. Writes nothing."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from fastdml.devices import device_name
from fastdml.train.folder import run_name
from fastdml.units import size

if TYPE_CHECKING:
    from fastdml.train.trainer import Trainer


def plan(trainer: Trainer) -> str:
    """Runs the first step of `trainer`, which changes its peers' weights, and describes the run."""
    config, device, cohort = trainer.config, trainer.device, trainer.cohort
    progress = trainer.progress
    cohort.train()
    batch = next(trainer.batches(0))
    choice = trainer.choose(batch)
    started = time.perf_counter()
    losses = trainer.step(*batch).losses.tolist()
    seconds = time.perf_counter() - started
    counts = trainer.parameters()
    held = sum(v.nbytes for v in cohort.state_dict().values())
    held += sum(
        v.nbytes
        for state in trainer.optimizer.state.values()
        for v in state.values()
        if torch.is_tensor(v)
    )
    if device.type == "cuda":
        memory = f"{size(torch.cuda.max_memory_allocated(device))} on the device at most"
    else:
        # ru_maxrss is in kilobytes, on macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        memory = f"{size(peak)} of this process at most, the data included"
    phases = 2 if config.independent else 1
    folder = config.folder or f"runs/{run_name(config)}-NNN, the next free number"
    files = (
        f"config.yaml metrics.jsonl last.ckpt ({size(held)}) cohort.json peers/ best/ "
        + "".join(f"curves.{kind} pairwise_kl.{kind} " for kind in config.figures)
        + "summary.json"
    )
    hardware = device_name(device, choice.threads)
    rows = [
        ("dry run", "nothing was written"),
        *(
            (f"peer {k}", f"{name}, {count:,} parameters, loss of the first step {loss:.4f}")
            for k, (name, count, loss) in enumerate(zip(cohort.names, counts, losses, strict=True))
        ),
        (
            "device",
            f"{hardware}, {trainer.amp.name}, {config.update} updates",
        ),
        ("execution", trainer.step.name),
        (
            "steps",
            f"{trainer.steps:,} an epoch of {len(batch[-1])} images, {progress.epochs} epochs, "
            f"{progress.total * phases:,} in all" + (" (mutual and independent)" * (phases - 1)),
        ),
        ("first step", f"{seconds:.2f} s, start-up included"),
        ("memory", memory),
        ("run folder", folder + (" (resumed)" if config.resume else "")),
        (
            "files",
            files
            + " tensorboard/" * config.tensorboard
            + " initial.ckpt independent/" * (phases - 1),
        ),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)
