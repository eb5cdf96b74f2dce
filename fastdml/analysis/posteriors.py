"""How sure the peers are: entropy of their predictions, and the mean of the sorted probabilities.

The paper's figure of training images shows these: peers that learnt from each other leave more of
the probability to other classes than the most probable one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdml.analysis.networks import (
    Models,
    device_of,
    fixed_batches,
    logits_of,
    networks,
    rows_of,
)
from fastdml.analysis.plots import drawn
from fastdml.arguments import of_kind, whole_number
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.report.analysis_file import Result
from fastdml.report.plots import peer_style

RANKS = 10


@dataclass(frozen=True)
class Posterior(Result):
    """Of K networks and, last, of their ensemble, the mean of their probabilities."""

    peers: tuple[str, ...]  # K names and "ensemble"
    entropy: np.ndarray  # (K + 1,) float64: mean over images, nats
    ranked: np.ndarray  # (K + 1, R) float64: mean of the largest probability, of the second, ...
    images: int

    @property
    def top1(self) -> np.ndarray:
        """(K + 1,) float64: mean of the largest probability."""
        return self.ranked[:, 0]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "top1": self.top1.tolist()}


def posterior(models: Models, batches: Any, *, ranks: int = RANKS) -> Posterior:
    """Entropy and sorted probabilities of each network and of all together, in evaluation mode.

    batches: of (inputs, labels), as `fixed_batches` takes them; the labels are not looked at.
    ranks: how many of the sorted probabilities, at most one for each class. Raises InputError.
    """
    ranks = whole_number("ranks", ranks, 1)
    names, modules = networks(models)
    data = fixed_batches(batches, device_of(modules[0]))
    entropy: Tensor | None = None
    with torch.inference_mode():
        for inputs, _ in data:
            said = []
            for module in modules:
                with evaluating(module):
                    said.append(logits_of(module, inputs).softmax(1))
            if len({p.shape for p in said}) > 1:
                classes = ", ".join(f"{n} {p.shape[1]}" for n, p in zip(names, said, strict=True))
                raise InputError(f"all networks must tell the same classes apart: {classes}")
            p = torch.stack([*said, torch.stack(said).mean(0)])  # (K + 1, N, C)
            rows = -torch.special.xlogy(p, p).sum(2).sum(1)
            best = p.topk(min(ranks, p.shape[2]), dim=2).values.sum(1)
            if entropy is None:
                entropy, ranked = torch.zeros_like(rows), torch.zeros_like(best)
            entropy += rows
            ranked += best
    images = rows_of(data)
    assert entropy is not None
    return Posterior(
        peers=(*names, "ensemble"),
        entropy=(entropy / images).cpu().numpy(),
        ranked=(ranked / images).cpu().numpy(),
        images=images,
    )


def plot_posterior(found: Posterior, where: Any) -> Path | None:
    """The mean of the sorted probabilities, as in the paper's figure; the ensemble in black. where:
    as of `drawn`."""
    of_kind("found", found, Posterior, "posterior")

    def draw(axes: Any) -> None:
        ranks = np.arange(1, found.ranked.shape[1] + 1)
        K = len(found.peers) - 1
        for k, name in enumerate(found.peers):
            colour, marker = peer_style(k, K) if k < K else ("black", "")
            label = f"{name}, {found.entropy[k]:.2f} nats"
            axes.plot(ranks, found.ranked[k], color=colour, marker=marker, label=label)
        axes.set(xlabel="rank of the class", ylabel="mean probability", xticks=ranks)
        axes.legend()

    return drawn(where, draw)
