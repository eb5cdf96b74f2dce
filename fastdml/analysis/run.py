"""Analyses of the peers of a run: their weights and images found by its folder, the results kept in
its analysis.json, and in that of independent/.

What has been computed for the same weights with the same settings is not repeated, so that an
interrupted analysis goes on where it was. Only classification: what re-identification learns is not
in the logits alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastdml.analysis.networks import Batch, fixed_batches
from fastdml.analysis.posteriors import Posterior, posterior
from fastdml.analysis.weight_noise import SCALES, FlatMinima, Noise, flat_minima
from fastdml.arguments import shown, whole_number
from fastdml.cohort import Cohort
from fastdml.cohort_files import read_description
from fastdml.devices import choose_device
from fastdml.errors import InputError
from fastdml.paths import expand, expanded
from fastdml.report.metrics_log import INDEPENDENT
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import is_known
from fastdml.train.run_folder import BEST
from fastdml.train.run_weights import Weights, default_weights, run_config
from fastdml.train.tasks.classification import Classification, divided
from fastdml.train.tasks.task import task_of

Phase = Literal["mutual", "independent"]
ImagesOf = Literal["training", "test"]
IMAGES = 1000
HINT = "fastdml.data.load(..., download=True)"  # what fetches images that are missing


@dataclass(frozen=True, eq=False)
class RunPeers:
    """Of a finished phase of a run."""

    folder: Path  # of the phase
    weights: Weights
    sha256: str  # of the weights
    cohort: Cohort
    config: TrainConfig

    def batches(self, images: int = IMAGES, images_of: ImagesOf = "training") -> list[Batch]:
        """So many of the run's images (0: all) as the peers take them, not augmented, evenly of
        each class; a smaller number is part of a larger. Of a semi-supervised run the training
        images are those with labels. Raises InputError."""
        device = next(self.cohort.parameters()).device
        return images_of_run(self.config, self.cohort, device, images, images_of)


def peers_of_run(
    run: str | os.PathLike,
    phase: Phase = "mutual",
    *,
    weights: Weights | None = None,
    root: str | os.PathLike | None = None,
    device: str = "auto",
    peers: Sequence[str | nn.Module] | None = None,
) -> RunPeers:
    """The peers of a finished run, in evaluation mode.

    phase: "mutual", or "independent" for the peers that were trained each by itself. weights:
    "last" or "best"; None: the best where validation images chose them, else the last. root: the
    folder of the data set's files, where they are no longer where the run found them. peers: what
    to load into, as for `Cohort.load`. Raises InputError.
    """
    folder = expanded(run)
    config = run_config(folder)
    if root is not None:
        config = config.replace(root=expand(root))
    weights = default_weights(folder) if weights is None else weights
    place = _weights_folder(folder, phase, weights)
    cohort = Cohort.load(place, choose_device(device), peers=peers)
    own = folder if phase == "mutual" else folder / INDEPENDENT
    return RunPeers(own, weights, digest(place), cohort, config)


def flat_minima_of_run(
    run: str | os.PathLike,
    phase: Phase = "mutual",
    *,
    images: int = IMAGES,
    scales: Sequence[float] = SCALES,
    draws: int = 5,
    noise: Noise = "filter",
    seed: int = 0,
    root: str | os.PathLike | None = None,
    device: str = "auto",
) -> FlatMinima:
    """`flat_minima` of the peers of a run, on its training images, not augmented. Raises
    InputError."""
    found = peers_of_run(run, phase, root=root, device=device)
    batches = found.batches(images)
    return flat_minima(found.cohort, batches, scales=scales, draws=draws, noise=noise, seed=seed)


def posterior_of_run(
    run: str | os.PathLike,
    phase: Phase = "mutual",
    *,
    images: int = 0,
    images_of: ImagesOf = "training",
    root: str | os.PathLike | None = None,
    device: str = "auto",
) -> Posterior:
    """`posterior` of the peers of a run, on its images, not augmented. Raises InputError."""
    found = peers_of_run(run, phase, root=root, device=device)
    return posterior(found.cohort, found.batches(images, images_of))


def images_of_run(
    config: TrainConfig,
    cohort: Cohort,
    device: torch.device,
    images: int = IMAGES,
    images_of: ImagesOf = "training",
) -> list[Batch]:
    """See `RunPeers.batches`."""
    if not is_known(config.data):
        raise InputError(
            f"the run was trained by fit on {config.data}, which cannot be read here: give its "
            "peers and batches to the functions of fastdml.analysis"
        )
    task = task_of(config)
    if not isinstance(task, Classification):
        raise InputError(
            f"analyses are of classification runs, and this one is on {config.data}: give its "
            "peers and batches to the functions of fastdml.analysis"
        )
    images = whole_number("images", images, 0)
    if images_of not in ("training", "test"):
        raise InputError(f'images_of must be "training" or "test", not {shown(images_of)}')
    sets, _ = divided(task.splits(config, HINT), config)
    chosen = sets.train if images_of == "training" else sets.test or sets.validation
    if chosen is None:
        raise InputError(f"{config.data} has no test images")
    known = cohort.record()
    if known["classes"] and list(chosen.class_names) != list(known["classes"]):
        raise InputError(f"the peers were trained on other classes than those of {config.data}")
    if images and images < len(chosen):
        chosen = chosen.subset(images, config.seed)
    mean, std = (tuple(known[name] or getattr(chosen, name)) for name in ("mean", "std"))
    chosen = dataclasses.replace(chosen, mean=mean, std=std)
    return fixed_batches(task.evaluation_batches(chosen, config, device), device)


def digest(folder: Path) -> str:
    """SHA-256 of the weights that a folder's cohort.json describes. Raises InputError."""
    peers = read_description(folder / "cohort.json")["peers"]
    return hashlib.sha256("".join(peer["sha256"] for peer in peers).encode()).hexdigest()


def _weights_folder(run: Path, phase: Phase, weights: Weights) -> Path:
    if phase not in ("mutual", "independent"):
        raise InputError(f'phase must be "mutual" or "independent", not {phase!r}')
    if weights not in ("last", "best"):
        raise InputError(f'weights must be "last" or "best", not {weights!r}')
    place = run if phase == "mutual" else run / INDEPENDENT
    place = place if weights == "last" else place / BEST
    if not (place / "cohort.json").is_file():
        raise InputError(
            f"{place} holds no weights of the {phase} peers: they are written when the run ends"
        )
    return place
