"""Every analysis of the peers of a run, kept in its analysis.json and in that of independent/.

What is there for the same weights, images and seed is not computed again, and each result is saved
when it is there, so that an interrupted call goes on where it was. A result says which weights it
is of: those of other weights are not shown.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from typing import Any

import torch
from torch import nn

from fastdml.analysis.alignment import kernel_alignment
from fastdml.analysis.calibration import peers_temperature_scaling
from fastdml.analysis.gains import gains_by_noise
from fastdml.analysis.networks import Batch, logits_of, same_architecture
from fastdml.analysis.posteriors import posterior
from fastdml.analysis.run import IMAGES, Phase, RunPeers, digest, peers_of_run
from fastdml.analysis.sections import loss_plane, loss_section
from fastdml.analysis.weight_noise import flat_minima
from fastdml.arguments import listed, whole_number
from fastdml.errors import InputError
from fastdml.names import advice
from fastdml.paths import expanded
from fastdml.report.analysis_file import read_analysis, write_analysis
from fastdml.report.metrics_log import INDEPENDENT
from fastdml.report.predictions import read_predictions
from fastdml.train.run_folder import BEST
from fastdml.train.run_weights import Weights

logger = logging.getLogger(__name__)

SECTIONS = 3  # pairs of peers, or single ones, that there are sections of
PLANE = 9  # points a side
NOISE = "gains_by_noise"


@dataclass(frozen=True, eq=False)
class _Work:
    """What analyses of one phase are made from."""

    peers: RunPeers
    images: int
    seed: int

    @cached_property
    def training(self) -> list[Batch]:
        return self.peers.batches(self.images)

    @property
    def mark(self) -> dict[str, Any]:
        """What a result says it is of."""
        peers = self.peers
        told = {"weights": peers.weights, "sha256": peers.sha256}
        return {**told, "asked": self.images, "seed": self.seed}

    @property
    def alike(self) -> list[tuple[int, int]]:
        """The first pairs of peers that differ in their weights alone."""
        pairs = combinations(range(len(self.peers.cohort)), 2)
        cohort = self.peers.cohort
        found = (pair for pair in pairs if same_architecture(*(cohort[k] for k in pair)))
        return [*islice(found, SECTIONS)]


def _flat_minima(work: _Work) -> dict[str, Any]:
    return flat_minima(work.peers.cohort, work.training, seed=work.seed).to_dict()


def _posterior(work: _Work) -> dict[str, Any]:
    return {**posterior(work.peers.cohort, work.training).to_dict(), "set": "training"}


def _kernel_alignment(work: _Work) -> dict[str, Any]:
    return kernel_alignment(work.peers.cohort, work.training).to_dict()


def _loss_sections(work: _Work) -> list[dict[str, Any]]:
    """Between peers of one architecture; where there are none, along a random direction of each."""
    cohort = work.peers.cohort
    places: Iterable[tuple[int, ...]] = work.alike or [
        (k,) for k in range(min(SECTIONS, len(cohort)))
    ]
    return [
        loss_section(cohort, work.training, peers=peers, seed=work.seed).to_dict()
        for peers in places
    ]


def _loss_plane(work: _Work) -> dict[str, Any]:
    """Through three peers of one architecture, or as many as there are."""
    cohort = work.peers.cohort
    alike = [k for k in range(len(cohort)) if same_architecture(cohort[0], cohort[k])]
    plane = loss_plane(cohort, work.training, peers=alike[:3], points=PLANE, seed=work.seed)
    return plane.to_dict()


def _temperature_scaling(work: _Work) -> dict[str, Any]:
    """On all test images, since it is about images that were not trained on."""
    cohort = work.peers.cohort
    test = work.peers.batches(0, "test")
    with torch.inference_mode():
        logits = [
            torch.cat([logits_of(peer, inputs) for inputs, _ in test]).cpu().numpy()
            for peer in cohort
        ]
    labels = torch.cat([labels for _, labels in test]).cpu().numpy()
    return peers_temperature_scaling(logits, labels, cohort.names).to_dict()


ANALYSES: dict[str, Callable[[_Work], Any]] = {
    "posterior": _posterior,
    "flat_minima": _flat_minima,
    "kernel_alignment": _kernel_alignment,
    "temperature_scaling": _temperature_scaling,
    "loss_section": _loss_sections,
    "loss_plane": _loss_plane,
}


def analyse(
    run: str | os.PathLike,
    what: Sequence[str] | None = None,
    *,
    images: int = IMAGES,
    seed: int = 0,
    weights: Weights | None = None,
    root: str | os.PathLike | None = None,
    device: str = "auto",
    peers: Sequence[str | nn.Module] | None = None,
    noisy: Any = None,
) -> dict[Phase, dict[str, Any]]:
    """Analyses the peers of a finished classification run, and those of its independent phase, if
    it has one; returns what the analysis.json of each holds of them.

    what: names in `ANALYSES`: posterior, flat_minima, kernel_alignment, loss_section, loss_plane
    on training images, not augmented, and temperature_scaling on all test images; None: all.
    images: how many training images, 0 for all. seed: of noise and random directions. weights,
    root, device, peers: as for `peers_of_run`. noisy: (N,) bool, the test images, in their order,
    whose label is known to be wrong, which no run can tell: adds `gains_by_noise`, of a run with an
    independent phase.

    Where a result for these weights, images and seed is there, it is taken. Costs some hundred
    passes forward of `images` for each phase, most of them for loss_plane. Raises InputError.
    """
    folder = expanded(run)
    names = [*ANALYSES] if what is None else listed("what", what, "names of analyses")
    for name in names:
        if not isinstance(name, str) or name not in ANALYSES:
            raise InputError(f"there is no analysis {name!r}; {advice(str(name), ANALYSES)}")
    images, seed = whole_number("images", images, 0), whole_number("seed", seed, 0)
    phases: list[Phase] = ["mutual"]
    if (folder / INDEPENDENT / "cohort.json").is_file():
        phases.append("independent")
    found: dict[Phase, dict[str, Any]] = {}
    for phase in phases:
        loaded = peers_of_run(folder, phase, weights=weights, root=root, device=device, peers=peers)
        work = _Work(loaded, images, seed)
        found[phase] = _analyse(work, names, phase)
        if phase == "mutual" and noisy is not None:
            found[phase][NOISE] = _keep(loaded, NOISE, {**_by_noise(loaded, noisy), **work.mark})
    return found


def _by_noise(mutual: RunPeers, noisy: Any) -> dict[str, Any]:
    folder = mutual.folder
    told, alone = read_predictions(folder), read_predictions(folder / INDEPENDENT)
    if told is None or alone is None:
        raise InputError(
            f"{folder} lacks predictions of mutual or of independent peers, which noisy compares: "
            "train with independent=True"
        )
    if told.weights != mutual.weights:
        raise InputError(
            f"predictions of {folder} are of the {told.weights} weights: give weights="
            f'"{told.weights}" with noisy'
        )
    return gains_by_noise(alone, told, noisy).to_dict()


def current_analyses(folder: str | os.PathLike) -> dict[str, Any]:
    """What the analysis.json of a run's folder, or of its independent/, holds of the weights that
    are there now, by name. Raises InputError for a file that is damaged."""
    place = expanded(folder)
    found = read_analysis(place)
    if not found:
        return {}
    digests: dict[str, str | None] = {}
    for weights, where in (("last", place), ("best", place / BEST)):
        there = (where / "cohort.json").is_file()
        digests[weights] = digest(where) if there else None
    return {name: result for name, result in found.items() if _is_of(result, digests)}


def _is_of(result: Any, digests: Mapping[str, str | None]) -> bool:
    parts = _dicts(result)
    marks = [(digests.get(str(part.get("weights"))), part.get("sha256")) for part in parts]
    return bool(marks) and all(own is not None and own == said for own, said in marks)


def _analyse(work: _Work, names: Sequence[str], phase: str) -> dict[str, Any]:
    peers, mark, results = work.peers, work.mark, {}
    for name in names:
        known = read_analysis(peers.folder).get(name)
        if known and all(mark.items() <= said.items() for said in _dicts(known)):
            results[name] = known
            continue
        begin = time.perf_counter()
        made = ANALYSES[name](work)
        marked = [{**one, **mark} for one in made] if isinstance(made, list) else {**made, **mark}
        results[name] = _keep(peers, name, marked)
        logger.info(f"{phase}: {name}, {time.perf_counter() - begin:.1f} s")
    return results


def _keep(peers: RunPeers, name: str, result: Any) -> Any:
    """The result as analysis.json then has it."""
    # read again: another call may have added to it meanwhile
    write_analysis(peers.folder, {**read_analysis(peers.folder), name: result})
    return read_analysis(peers.folder)[name]


def _dicts(result: Any) -> list[Mapping[str, Any]]:
    """The parts of a result, each with the mark of its weights; empty ones for what has none."""
    parts = result if isinstance(result, list) else [result]
    return [part if isinstance(part, dict) else {} for part in parts]
