"""How flat the minima are: the loss under Gaussian noise on the weights.

The paper adds noise of standard deviation sigma to the weights and reports a loss that rises by a
tenth of a nat at sigma = 1 (after Chaudhari et al., "Entropy-SGD", 2017, and Keskar et al., 2017).
It does not say what sigma is relative to; where weights are a tenth in size, noise of 1 leaves
nothing of them. Two noises are measured here instead:

"filter": the standard deviation is sigma times the root mean square of the filter that the weight
is in, so that the noise is about sigma times as long as the filter. BatchNorm makes a network blind
to the length of the filters before it, and ReLU to a factor that moves from one layer to the next
(Dinh et al., "Sharp minima can generalize for deep nets", 2017): by a noise of one size a network
is flat because its weights are long. The normalisation is that of Li et al., "Visualizing the loss
landscape of neural nets", 2018.

"absolute": the standard deviation is sigma, for every weight. For networks of one architecture and
one weight decay alone, and not to be compared with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastdml.analysis.networks import (
    Batch,
    Models,
    device_of,
    filters,
    fixed_batches,
    networks,
    rows_of,
    score,
    standard_normal,
    weights_kept,
)
from fastdml.analysis.plots import drawn
from fastdml.arguments import finite_number, listed, of_kind, shown, whole_number
from fastdml.errors import InputError
from fastdml.report.analysis_file import Result
from fastdml.report.plots import peer_style

Noise = Literal["filter", "absolute"]
Noised = Literal["weights", "all"]
SCALES = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class FlatMinima(Result):
    """Of K networks at S scales of noise, the first of them 0."""

    peers: tuple[str, ...]
    scales: tuple[float, ...]
    loss: np.ndarray  # (K, S) float64: mean cross-entropy in nats, over images and draws
    spread: np.ndarray  # (K, S) float64: standard deviation over draws; NaN for one draw
    draws: int
    images: int
    noise: str
    noised: str
    seed: int

    @property
    def increase(self) -> np.ndarray:
        """(K, S) float64: how much the noise raises the loss, in nats."""
        return self.loss - self.loss[:, :1]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "increase": self.increase.tolist()}


def flat_minima(
    models: Models,
    batches: Any,
    *,
    scales: Sequence[float] = SCALES,
    draws: int = 5,
    noise: Noise = "filter",
    noised: Noised = "weights",
    seed: int = 0,
) -> FlatMinima:
    """The mean loss of each network with noise on its weights, on the images of `batches`.

    batches: of (inputs, labels), as `fixed_batches` takes them; kept in memory. scales: sigma, see
    `noise`. draws: how often noise is drawn. A draw is the same for all scales, for all networks of
    one architecture and on every device, so that differences between these are not those of the
    noise. noise: "filter", sigma times the root mean square of the weight's filter, or "absolute".
    noised: the "weights" of layers, which are parameters of at least two dimensions, or "all"
    parameters, also biases and those of BatchNorm; a vector then counts as one filter. BatchNorm
    keeps the statistics that it has, and the networks run in evaluation mode.

    The networks come back as they were, bit for bit, also where it is interrupted. Costs
    1 + scales x draws passes forward for each network, and three copies of one network's weights.
    Raises InputError.
    """
    checked = _checked_scales(scales)
    draws, seed = whole_number("draws", draws, 1), whole_number("seed", seed, 0)
    if noise not in ("filter", "absolute"):
        raise InputError(f'noise must be "filter" or "absolute", not {noise!r}')
    if noised not in ("weights", "all"):
        raise InputError(f'noised must be "weights" or "all", not {noised!r}')
    names, modules = networks(models)
    data = fixed_batches(batches, device_of(modules[0]))
    losses = []  # (K, S, draws)
    for name, module in zip(names, modules, strict=True):
        parameters = [p for p in module.parameters() if noised == "all" or p.dim() > 1]
        if not parameters:
            raise InputError(f'{name} has no weights of two dimensions: noised="all" takes others')
        losses.append(_noisy_losses(module, parameters, data, checked, draws, noise, seed))
    values = np.array(losses, np.float64)
    spread = values.std(axis=2, ddof=1) if draws > 1 else np.full(values.shape[:2], math.nan)
    spread[:, 0] = 0.0
    return FlatMinima(
        peers=names,
        scales=(0.0, *checked),
        loss=values.mean(axis=2),
        spread=spread,
        draws=draws,
        images=rows_of(data),
        noise=noise,
        noised=noised,
        seed=seed,
    )


def _noisy_losses(
    module: nn.Module,
    parameters: Sequence[Tensor],
    data: Sequence[Batch],
    scales: Sequence[float],
    draws: int,
    noise: Noise,
    seed: int,
) -> list[list[float]]:
    """[S][draws] losses; without noise the same for every draw."""
    with weights_kept(module):
        found = [[score(module, data).loss] * draws, *([] for _ in scales)]
        trained = [p.detach().clone() for p in parameters]
        units = [
            _unit(p) if noise == "filter" else torch.ones((), device=p.device) for p in trained
        ]
        for draw in range(draws):
            normal = standard_normal(trained, (seed, draw))
            for s, scale in enumerate(scales, 1):
                with torch.no_grad():
                    for p, w, e, unit in zip(parameters, trained, normal, units, strict=True):
                        p.copy_(w + scale * unit * e)
                found[s].append(score(module, data).loss)
    return found


def _unit(weight: Tensor) -> Tensor:
    """The root mean square of each filter, in a shape that multiplies `weight`."""
    numbers = weight[0].numel() if weight.dim() > 1 else weight.numel()
    return (filters(weight) / math.sqrt(max(numbers, 1))).to(weight.dtype)


def _checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    given = listed("scales", scales, "numbers, such as [0.1]")
    found = tuple(finite_number("each of scales", scale) for scale in given)
    if not found or min(found) <= 0:
        raise InputError(f"scales must be numbers above 0, not {shown(given)}: 0 is always there")
    return found


def plot_flat_minima(found: FlatMinima, where: Any) -> Path | None:
    """The rise of the loss over the scale of the noise, with its standard error over draws. where:
    as of `drawn`."""
    of_kind("found", found, FlatMinima, "flat_minima")

    def draw(axes: Any) -> None:
        for k, name in enumerate(found.peers):
            colour, marker = peer_style(k, len(found.peers))
            error = found.spread[k] / math.sqrt(found.draws)
            axes.errorbar(
                found.scales,
                found.increase[k],
                np.nan_to_num(error),
                color=colour,
                marker=marker,
                label=name,
            )
        unit = "of the filter's root mean square" if found.noise == "filter" else "absolute"
        axes.set(xlabel=f"noise on the weights ({unit})", ylabel="rise of the loss (nats)")
        axes.legend()

    return drawn(where, draw)
