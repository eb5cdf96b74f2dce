"""Sections through the loss: along a line, and over a plane, of the space of weights.

Between two peers the line, through three the plane; where there are fewer, random directions fill
up, each filter of them as long as the network's own (Li et al., "Visualizing the loss landscape of
neural nets", 2018), vectors such as biases left as they are. Coordinates are multiples: of the way
from the first peer to the second, or of a random direction.

BatchNorm: the running statistics between two networks are those of neither, and interpolating them
is wrong: activations of mixed weights vary less than the stored variances say, and that by itself
raises the loss (Jordan et al., "REPAIR", 2023; of averaged weights Izmailov et al., "Averaging
weights leads to wider optima", 2018). By default they are estimated afresh at every point.

Peers that began with different weights are mostly apart by a high barrier, since their units are
permuted (Entezari et al., "The role of permutation invariance in linear mode connectivity", 2022):
a low one says that they found one basin, a high one does not say that they compute other things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdml.analysis.networks import (
    BATCH_NORM,
    Batch,
    Models,
    Networks,
    Score,
    device_of,
    filters,
    fixed_batches,
    logits_of,
    networks,
    reestimate_batch_norm,
    rows_of,
    same_architecture,
    score,
    standard_normal,
    weights_kept,
)
from fastdml.analysis.plots import drawn
from fastdml.arguments import finite_number, listed, of_kind, shown, whole_number
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.report.analysis_file import Result
from fastdml.report.plots import COLOURS, MARKERS

BatchNorm = Literal["reestimated", "stored"]
COMPARED = 16  # images that tell whether two networks are of one architecture


@dataclass(frozen=True)
class LossSection(Result):
    """The loss along a line."""

    peers: tuple[str, ...]  # two: 0 is the first, 1 the second; one: 0, and a random direction
    at: np.ndarray  # (P,) float64
    loss: np.ndarray  # (P,) float64: mean cross-entropy, nats
    accuracy: np.ndarray  # (P,) float64, 0 to 1
    distance: float  # the length of 1, in weight space
    images: int
    batch_norm: str
    seed: int

    @property
    def barrier(self) -> float:
        """How far the loss between two peers rises at most above the straight line between their
        losses, in nats (Frankle et al., 2020); NaN along a random direction."""
        if len(self.peers) < 2:
            return math.nan
        inside = (self.at >= 0) & (self.at <= 1)
        t, loss = self.at[inside], self.loss[inside]
        return float((loss - ((1 - t) * loss[0] + t * loss[-1])).max())

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "barrier": self.barrier}


@dataclass(frozen=True)
class LossPlane(Result):
    """The loss over a plane."""

    peers: tuple[str, ...]  # one to three that the plane goes through
    x: np.ndarray  # (X,) float64
    y: np.ndarray  # (Y,) float64
    loss: np.ndarray  # (Y, X) float64: mean cross-entropy, nats
    points: np.ndarray  # (len(peers), 2) float64: where the peers are
    distance: float  # the length of 1 along x, in weight space
    images: int
    batch_norm: str
    seed: int


def loss_section(
    models: Models,
    batches: Any,
    *,
    peers: Sequence[int | str] | None = None,
    points: int = 11,
    beyond: float = 0.2,
    reach: float = 1.0,
    batch_norm: BatchNorm = "reestimated",
    seed: int = 0,
) -> LossSection:
    """The loss on the images of `batches` along the line through two peers of one architecture, or
    from one peer along a random direction.

    batches: of (inputs, labels), as `fixed_batches` takes them; kept in memory. peers: two, or one,
    by name or number; None: the first two, or the only one. points: from the first peer to the
    second, both counted; `beyond` goes so far past each of them, in steps of the same width. Of one
    peer `points` are spread over -reach to reach. batch_norm: "reestimated" on these images at
    every point, or "stored": the running statistics, of two peers interpolated. seed: of the random
    direction. The networks come back as they were, bit for bit. Costs two passes forward a point
    with BatchNorm, else one. Raises InputError.
    """
    found = networks(models)
    chosen = _chosen(found, peers, 2, batch_norm)
    points, seed = _checked(points, beyond, reach, seed)
    modules = [found.modules[k] for k in chosen]
    data = fixed_batches(batches, device_of(modules[0]))
    _check_alike([found.names[k] for k in chosen], modules, data[0][0][:COMPARED])
    anchors = [_state(module) for module in modules]
    if len(chosen) == 2:
        steps = round(beyond * (points - 1))
        at = np.arange(-steps, points + steps) / (points - 1)  # 0 and 1 to the bit
        distance = _length(_way(*modules))
        mixes = [(1 - t, t) for t in at]
    else:
        at = np.linspace(-reach, reach, points)
        anchors.append(_random_direction(modules[0], (seed, 0)))
        distance = _length(_weights(modules[0], anchors[1]))
        mixes = [(1.0, t) for t in at]
    scores = _scores(modules[0], anchors, mixes, data, batch_norm)
    return LossSection(
        peers=tuple(found.names[k] for k in chosen),
        at=at,
        loss=np.array([s.loss for s in scores]),
        accuracy=np.array([s.accuracy for s in scores]),
        distance=distance,
        images=rows_of(data),
        batch_norm=batch_norm,
        seed=seed,
    )


def loss_plane(
    models: Models,
    batches: Any,
    *,
    peers: Sequence[int | str] | None = None,
    points: int = 11,
    beyond: float = 0.25,
    reach: float = 1.0,
    batch_norm: BatchNorm = "reestimated",
    seed: int = 0,
) -> LossPlane:
    """The loss on the images of `batches` over a plane of `points` x `points` in weight space.

    peers: three, the plane through them; two, the line through them and a random direction
    orthogonal to it; one, two random directions. None: the first three, or as many as there are.
    The first is at (0, 0) and the second at (1, 0); 1 is as long on both axes, which are orthogonal
    (of a single peer nearly so, as random directions are). beyond: how far past the peers it goes;
    of a single peer `reach` says how far to every side. The rest as for `loss_section`. Raises
    InputError.
    """
    found = networks(models)
    chosen = _chosen(found, peers, 3, batch_norm)
    points, seed = _checked(points, beyond, reach, seed)
    modules = [found.modules[k] for k in chosen]
    data = fixed_batches(batches, device_of(modules[0]))
    _check_alike([found.names[k] for k in chosen], modules, data[0][0][:COMPARED])
    plane = _plane(modules, seed)
    x, y = _axes(plane.points, points, beyond, reach)
    mixes = [plane.mix(a, b) for b in y for a in x]
    scores = _scores(modules[0], plane.anchors, mixes, data, batch_norm)
    return LossPlane(
        peers=tuple(found.names[k] for k in chosen),
        x=x,
        y=y,
        loss=np.array([s.loss for s in scores]).reshape(points, points),
        points=plane.points,
        distance=plane.distance,
        images=rows_of(data),
        batch_norm=batch_norm,
        seed=seed,
    )


State = list[Tensor]  # the parameters and buffers of a network, or a direction
Mix = tuple[float, ...]  # how much of each anchor a point is


class _Plane(NamedTuple):
    anchors: list[State]
    basis: np.ndarray  # (3, anchors): of each anchor at the origin, and a step along x, along y
    points: np.ndarray  # (peers, 2)
    distance: float

    def mix(self, x: float, y: float) -> Mix:
        return tuple((self.basis[0] + x * self.basis[1] + y * self.basis[2]).tolist())


def _plane(modules: Sequence[nn.Module], seed: int) -> _Plane:
    first = modules[0]
    anchors = [_state(module) for module in modules]
    if len(anchors) == 1:
        anchors += [_random_direction(first, (seed, n)) for n in (0, 1)]
        distance = _length(_weights(first, anchors[1]))
        return _Plane(anchors, np.eye(3), np.zeros((1, 2)), distance)
    u = _way(*modules[:2])
    length = _length(u)
    if len(anchors) == 3:
        third = _way(first, modules[2])
    else:
        anchors.append(_random_direction(first, (seed, 0)))
        third = _weights(first, anchors[2])
    # third = along * u + across * v, with v orthogonal to u and as long
    along = float(third @ u) / length**2
    across = _length(third - along * u) / length
    if across < 1e-6:
        raise InputError("the three peers are on one line, which is no plane: give two of them")
    if len(modules) == 3:
        basis = [[1, 0, 0], [-1, 1, 0], np.array([along - 1, -along, 1]) / across]
        points = [[0, 0], [1, 0], [along, across]]
    else:
        basis = [[1, 0, 0], [-1, 1, 0], np.array([along, -along, 1]) / across]
        points = [[0, 0], [1, 0]]
    return _Plane(anchors, np.array(basis, np.float64), np.array(points, np.float64), length)


def _axes(
    at: np.ndarray, points: int, beyond: float, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates of a plane with peers at these places."""
    if len(at) == 1:
        axis = np.linspace(-reach, reach, points)
        return axis, axis
    low, high = at.min(0) - beyond, at.max(0) + beyond
    if len(at) == 2:  # as far to both sides as it is long
        low[1], high[1] = -0.5 - beyond, 0.5 + beyond
    return np.linspace(low[0], high[0], points), np.linspace(low[1], high[1], points)


def _scores(
    module: nn.Module,
    anchors: Sequence[State],
    mixes: Sequence[Mix],
    data: Sequence[Batch],
    batch_norm: BatchNorm,
) -> list[Score]:
    """Of `module` with the weights that each mix makes of the anchors."""
    tensors = _tensors(module)
    # what is alike in all peers, such as a table of positions, stays as it is to the bit
    moving = [
        (i, tensor)
        for i, tensor in enumerate(tensors)
        if tensor.is_floating_point()
        and any(not torch.equal(anchor[i], anchors[0][i]) for anchor in anchors[1:])
    ]
    variances = {id(m.running_var) for m in module.modules() if isinstance(m, BATCH_NORM)}
    found = []
    with weights_kept(module):
        for mix in mixes:
            with torch.no_grad():
                for i, tensor in moving:
                    parts = [c * a[i] for c, a in zip(mix, anchors, strict=True) if c]
                    value = torch.stack(parts).sum(0) if parts else torch.zeros_like(tensor)
                    # beyond the peers an extrapolated variance may be below 0
                    tensor.copy_(value.clamp(min=0) if id(tensor) in variances else value)
            if batch_norm == "reestimated":
                reestimate_batch_norm(module, data)
            found.append(score(module, data))
    return found


def _tensors(module: nn.Module) -> State:
    return [*module.parameters(), *module.buffers()]


def _state(module: nn.Module) -> State:
    """A copy of the parameters and buffers."""
    return [tensor.detach().clone() for tensor in _tensors(module)]


def _weights(module: nn.Module, state: State) -> Tensor:
    """The parameters in a state of `module`, as one vector in float64."""
    count = len(list(module.parameters()))
    return torch.cat([tensor.flatten().double() for tensor in state[:count]])


def _way(start: nn.Module, end: nn.Module) -> Tensor:
    """From the parameters of one network to those of another. Raises InputError for none."""
    way = _weights(end, _state(end)).to(device_of(start)) - _weights(start, _state(start))
    if not float(way.norm()) > 0:
        raise InputError("two of the peers have the same weights: there is no way between them")
    return way


def _length(vector: Tensor) -> float:
    return float(vector.norm())


def _random_direction(module: nn.Module, seeds: tuple[int, int]) -> State:
    """Standard normal, each filter as long as the network's; 0 for vectors and buffers."""
    weights = [p.detach() for p in module.parameters()]
    direction = []
    for weight, normal in zip(weights, standard_normal(weights, seeds), strict=True):
        if weight.dim() < 2:
            direction.append(torch.zeros_like(weight))
            continue
        scale = filters(weight) / filters(normal).clamp(min=1e-12)
        direction.append(normal * scale.to(weight.dtype))
    return direction + [torch.zeros_like(buffer) for buffer in module.buffers()]


def _chosen(
    found: Networks, peers: Sequence[int | str] | None, most: int, batch_norm: str
) -> list[int]:
    """The numbers of the peers that a section goes through, of at most so many."""
    if batch_norm not in ("reestimated", "stored"):
        raise InputError(f'batch_norm must be "reestimated" or "stored", not {batch_norm!r}')
    if peers is None:
        return list(range(min(most, len(found.names))))
    given = listed("peers", peers, "names or numbers of peers")
    chosen = found.numbers(given)
    if not 1 <= len(chosen) <= most or len({*chosen}) < len(chosen):
        raise InputError(f"peers must be 1 to {most} different ones, not {shown(given)}")
    return chosen


def _checked(points: int, beyond: float, reach: float, seed: int) -> tuple[int, int]:
    """points and seed."""
    if finite_number("beyond", beyond) < 0 or finite_number("reach", reach) <= 0:
        raise InputError(f"beyond must be 0 or more and reach above 0, not {beyond} and {reach}")
    return whole_number("points", points, 2), whole_number("seed", seed, 0)


def _check_alike(names: Sequence[str], modules: Sequence[nn.Module], inputs: Tensor) -> None:
    """Raises InputError for networks whose weights cannot be mixed."""
    first = modules[0]
    for name, module in zip(names, modules, strict=True):
        _check_repeats(name, module, inputs)
    for name, module in zip(names[1:], modules[1:], strict=True):
        if not same_architecture(first, module) or not _answers_alike(first, module, inputs):
            raise InputError(
                f"{names[0]} and {name} are of different architectures: there is nothing "
                "between their weights; a random direction needs one of them"
            )


def _check_repeats(name: str, module: nn.Module, inputs: Tensor) -> None:
    """Raises InputError for a network that draws at random also in evaluation mode: what it says
    would differ from itself."""
    with evaluating(module), torch.no_grad():
        a, b = logits_of(module, inputs), logits_of(module, inputs)
    if not _near(a, b):
        raise InputError(
            f"{name} gives other answers to the same inputs each time, in evaluation mode too, so "
            "that its loss at a point is not one number: turn off what draws at random in it, such "
            "as F.dropout without training=self.training"
        )


def _answers_alike(first: nn.Module, other: nn.Module, inputs: Tensor) -> bool:
    """Whether `first` says with the weights of `other` what `other` says, to rounding: neither
    strides nor activations are seen in the shapes of weights."""
    with weights_kept(first), evaluating(other), torch.no_grad():
        for tensor, value in zip(_tensors(first), _tensors(other), strict=True):
            tensor.copy_(value)
        a, b = logits_of(first, inputs), logits_of(other, inputs)
    return _near(a, b)


def _near(a: Tensor, b: Tensor) -> bool:
    near = 1e-2 * float(b.nan_to_num(0, 0, 0).abs().max())  # bf16 has two digits
    return torch.allclose(a, b, rtol=0, atol=near, equal_nan=True)


def plot_loss_section(found: LossSection, where: Any) -> Path | None:
    """The loss, and dashed the accuracy, along the line. where: as of `drawn`."""
    of_kind("found", found, LossSection, "loss_section")

    def draw(axes: Any) -> None:
        axes.plot(found.at, found.loss, color=COLOURS[0], marker=MARKERS[0])
        axes.set_ylabel("loss (nats)", color=COLOURS[0])
        other = axes.twinx()
        other.plot(found.at, 100 * found.accuracy, color=COLOURS[1], linestyle="--")
        other.set_ylabel("accuracy (%)", color=COLOURS[1])
        other.grid(False)
        for at, name in enumerate(found.peers):
            axes.axvline(at, color="black", linewidth=0.6)
            axes.annotate(name, (at, 1), xycoords=("data", "axes fraction"), va="bottom")
        pair = len(found.peers) == 2
        axes.set_xlabel("from the first peer to the second" if pair else "random direction")

    return drawn(where, draw)


def plot_loss_plane(found: LossPlane, where: Any) -> Path | None:
    """The loss over the plane as contours, on a logarithmic scale, with the peers. where: as of
    `drawn`."""
    of_kind("found", found, LossPlane, "loss_plane")

    def draw(axes: Any) -> None:
        loss = np.log10(np.maximum(found.loss, 1e-6))
        image = axes.contourf(found.x, found.y, loss, levels=20, cmap="viridis")
        axes.figure.colorbar(image, ax=axes, label="log10 of the loss (nats)")
        for name, (x, y) in zip(found.peers, found.points, strict=True):
            axes.plot(x, y, marker="o", color="white", markeredgecolor="black")
            axes.annotate(name, (x, y), color="white", xytext=(3, 3), textcoords="offset points")
        axes.set_aspect("equal")
        axes.grid(False)

    return drawn(where, draw, height=2.8)
