"""What each peer costs a device: bytes from passes over tensors without values, seconds by a clock.

Bytes are exact whatever the batch and need neither memory nor a GPU: torch works out which tensors
the backward pass keeps. A network that reads values in its forward pass is run on a few images
instead. Seconds are measured on this machine's device, or given by somebody who did.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer
from fastdml.engine.amp import Amp, AmpName, resolve_amp
from fastdml.engine.optimizers import OptimizerName
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.parallel import shards
from fastdml.plan.costs import Line, PeerCost
from fastdml.torch_private import valueless_tensors

FEW, MORE = 8, 16  # images of the two passes from which bytes are known
ROUNDS, ENOUGH = 20, 1.0  # of a clock: so many times, or until so many seconds are over
BACKWARD = 2.0  # of a step whose time is given: a backward pass takes twice its forward pass


def peer_costs(
    names: Sequence[str],
    classes: int,
    image_shape: Sequence[int],
    *,
    seconds: Sequence[tuple[Line, Line, float]],
    amp: AmpName = "off",
    optimizer: OptimizerName = "sgd",
) -> list[PeerCost]:
    """The costs of the peers of these names.

    image_shape: (channels, height, width). amp: off, bf16 or fp16. seconds: of each peer its
    forward pass and its backward pass, of so many images, and its update; `measured_seconds` and
    `given_seconds` make them.
    """
    known: dict[str, Bytes] = {}
    found = []
    for name, (forward, backward, update) in zip(names, seconds, strict=True):
        if name not in known:
            known[name] = _bytes(name, classes, image_shape, amp, optimizer)
        found.append(PeerCost(name, forward, backward, update, *known[name]))
    return found


# --- bytes ---


class Bytes(NamedTuple):
    """The fields of `PeerCost` that are bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: Line
    units: tuple[int, ...]


def _bytes(
    name: str, classes: int, image_shape: Sequence[int], amp: AmpName, optimizer: OptimizerName
) -> Bytes:
    arguments = (name, classes, image_shape, amp, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of addresses, which such tensors have none of
            return _counted(*arguments, values=False)
    except InputError:
        raise
    except Exception:  # its forward pass needs values
        return _counted(*arguments, values=True)


def _counted(
    name: str,
    classes: int,
    image_shape: Sequence[int],
    amp: AmpName,
    optimizer: OptimizerName,
    *,
    values: bool,
) -> Bytes:
    with nullcontext() if values else valueless_tensors():
        cohort = Cohort(
            [name], classes, in_channels=image_shape[0], image_size=tuple(image_shape[1:])
        ).train()
        precision = resolve_amp("off" if amp == "off" else "bf16", torch.device("cpu"))
        few, more = (
            _saved_bytes(cohort.peers[0], torch.zeros(n, *image_shape), precision)
            for n in (FEW, MORE)
        )
        weights = sum(t.nbytes for t in (*cohort.parameters(), *cohort.buffers()))
        trained = [w for w in cohort.parameters() if w.requires_grad]
        state = _state_bytes(cohort, trained, optimizer)
        units = _unit_bytes(cohort.peers[0])
    each = (more - few) / (MORE - FEW)
    activations = Line(few - FEW * each, each)
    return Bytes(weights, sum(w.nbytes for w in trained), state, activations, units)


def _saved_bytes(peer: nn.Module, images: Tensor, amp: Amp) -> int:
    """What autograd keeps for the backward pass, but for the weights and the images themselves."""
    own = [t.untyped_storage() for t in (*peer.parameters(), *peer.buffers(), images)]
    known = {id(storage) for storage in own}  # one object for all tensors that lie in it
    saved: dict[int, torch.UntypedStorage] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if id(storage) not in known:
            saved[id(storage)] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), amp.autocast():
        peer(images)
    return sum(storage.nbytes() for storage in saved.values())


def _unit_bytes(peer: nn.Module) -> tuple[int, ...]:
    """Of the weights that FSDP gathers together: of each block, then of what is in none."""
    blocks = [sum(w.nbytes for w in block.parameters()) for block in shards.blocks(peer)]
    rest = sum(w.nbytes for w in peer.parameters()) - sum(blocks)
    return (*blocks, rest) if rest else tuple(blocks)


def _state_bytes(cohort: Cohort, trained: Sequence[Tensor], name: OptimizerName) -> int:
    optimizer = make_optimizer(cohort, name, lr=0.0)
    for w in trained:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    states = optimizer.state.values()
    return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))


# --- seconds ---


def given_seconds(
    milliseconds: Sequence[float],
    images: int,
    *,
    of_share: Sequence[float] | None = None,
    share: int = 0,
) -> list[tuple[Line, Line, float]]:
    """What `peer_costs` takes, from the time of each peer's step on a batch of so many images.

    of_share: the same of a batch of `share` images; without it half a batch takes half the time,
    which no device does on small ones. A third of the time is the forward pass's.
    """
    found = []
    for k, ms in enumerate(milliseconds):
        pairs = [(images, 1e-3 * ms)]
        if of_share is not None and share != images:
            pairs.append((share, 1e-3 * of_share[k]))
        whole = _line(pairs)
        parts = (1 / (1 + BACKWARD), BACKWARD / (1 + BACKWARD))
        forward, backward = (Line(part * whole.fixed, part * whole.each) for part in parts)
        found.append((forward, backward, 0.0))
    return found


def measured_seconds(
    names: Sequence[str],
    classes: int,
    image_shape: Sequence[int],
    images: Sequence[int],
    *,
    amp: AmpName = "auto",
    optimizer: OptimizerName = "sgd",
    device: torch.device,
) -> list[tuple[Line, Line, float]]:
    """What `peer_costs` takes, measured on the device: each peer by itself, the fastest of a few
    steps on batches of each of `images` numbers (one or two). Waits for the device."""
    known: dict[str, tuple[Line, Line, float]] = {}
    for name in dict.fromkeys(names):
        channels, *size = image_shape
        cohort = Cohort([name], classes, in_channels=channels, image_size=tuple(size))
        cohort = cohort.to(device).to(memory_format=torch.channels_last).train()
        batches = [torch.randn(n, *image_shape, device=device) for n in images]
        known[name] = lines(cohort, batches, amp, optimizer)
    return [known[name] for name in names]


def lines(
    cohort: Cohort, batches: Sequence[Tensor], amp: AmpName, optimizer: OptimizerName
) -> tuple[Line, Line, float]:
    """Seconds of the first peer's forward and backward pass, of so many images, and of its update.

    batches: one or two, of different numbers of images (N, ...).
    """
    timed = [_timed(cohort, batch, amp, optimizer) for batch in batches]
    sizes = [len(batch) for batch in batches]
    forward, backward = (
        _line([(n, times[i]) for n, times in zip(sizes, timed, strict=True)]) for i in (0, 1)
    )
    return forward, backward, min(times[2] for times in timed)


def loss_seconds(K: int, classes: int, images: Sequence[int], device: torch.device) -> Line:
    """Of the loss of K peers' logits of so many images, with the gradients for all: a row of a
    mesh, which needs its own peers' alone, takes no longer."""
    return _line([(n, _loss_seconds(K, classes, n, device)) for n in images])


def _loss_seconds(K: int, classes: int, images: int, device: torch.device) -> float:
    loss = MutualLoss()
    logits = [torch.randn(images, classes, device=device) for _ in range(K)]
    labels = torch.randint(classes, (images,), device=device)
    times: list[float] = []
    for _ in range(ROUNDS):
        clock = _Clock(device)
        loss.value_and_grad(logits, labels)
        clock.lap()
        times += clock.laps
    return min(times)


def _timed(
    cohort: Cohort, images: Tensor, amp: AmpName, name: OptimizerName
) -> tuple[float, float, float]:
    """Seconds of the fastest forward pass, backward pass and update."""
    peer, precision = cohort.peers[0], resolve_amp(amp, images.device)
    optimizer = make_optimizer(cohort, name, lr=0.0)  # which leaves the weights as they are
    times: list[list[float]] = []
    images = images.contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    while len(times) < ROUNDS and (len(times) < 2 or time.perf_counter() - start < ENOUGH):
        clock = _Clock(images.device)
        with precision.autocast():
            logits = peer(images)
        clock.lap()
        logits.backward(torch.ones_like(logits) / logits.numel())
        clock.lap()
        optimizer.step()
        optimizer.zero_grad()
        clock.lap()
        times.append(clock.laps)
    forward, backward, update = (min(each) for each in zip(*times, strict=True))
    return forward, backward, update


class _Clock:
    """Seconds between calls of `lap`, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, list[float]()
        self.last = self._now()

    def lap(self) -> None:
        now = self._now()
        self.laps.append(now - self.last)
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _line(pairs: Sequence[tuple[int, float]]) -> Line:
    """Through one point and the origin, or through two, with neither part below 0."""
    n, seconds = pairs[0]
    if len(pairs) == 1 or pairs[1][0] == n:
        return Line(0.0, seconds / n)
    less, fewer = pairs[1]
    each = min(max((seconds - fewer) / (n - less), 0.0), seconds / n)
    return Line(seconds - each * n, each)
