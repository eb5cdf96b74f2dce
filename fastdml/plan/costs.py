"""What a step on a mesh sends, takes and holds: formulas, as functions of numbers alone.

Nothing here communicates or measures. Seconds, bytes and images throughout; docs/scaling.md has the
same formulas with their check against measured steps.

P rows ("peer" axis) and D columns ("data" axis). A row's peers share its devices in turn. N: images
of a column's share of the batch, or of one of its `parts`. s: bytes of one logit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastdml.plan.links import Link

# DistributedDataParallel's first bucket of gradients, and the others, in bytes (its defaults).
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20


class Line(NamedTuple):
    """A quantity that grows with the number of images: `fixed + each * images`."""

    fixed: float
    each: float

    def __call__(self, images: float) -> float:
        return self.fixed + self.each * images


NOTHING = Line(0.0, 0.0)


@dataclass(frozen=True)
class PeerCost:
    """What one peer costs a device by itself."""

    name: str
    forward: Line  # seconds of so many images
    backward: Line  # the same
    update: float  # seconds of its optimizer step
    weights: int  # bytes of parameters and buffers
    gradients: int  # bytes of the gradients: of what is trained
    optimizer: int  # bytes of the optimizer's state
    activations: Line  # bytes that the backward pass needs, of so many images
    units: tuple[int, ...] = ()  # bytes of the weights that FSDP gathers together; (): of all

    def seconds(self, images: float) -> float:
        """Of a step of this peer alone."""
        return self.forward(images) + self.backward(images) + self.update


@dataclass(frozen=True)
class Layout:
    """Where peers are: `rows[k]` is the row of peer k, each of `data` devices.

    Ranks go along the data axis first (rank = row * data + column), so many on each of `nodes`.
    fsdp: peers are cut over their row (`fully_shard`), not copied to each of its devices.
    """

    rows: tuple[int, ...]
    data: int = 1
    nodes: int = 1
    fsdp: bool = False

    @property
    def peer(self) -> int:
        return max(self.rows) + 1

    @property
    def devices(self) -> int:
        return self.peer * self.data

    def of_row(self, row: int) -> list[int]:
        """The peers that live there."""
        return [k for k, r in enumerate(self.rows) if r == row]

    def columns_a_node(self) -> int:
        """How many columns have devices on one node."""
        return min(self.data, self.devices // self.nodes)


@dataclass(frozen=True)
class Step:
    """One step of one row, in seconds, and what each of its devices sends, in bytes."""

    forward: float
    exchange: float  # that the device waits for logits
    loss: float
    backward: float
    reduction: float  # that it waits for gradients, of FSDP also for weights
    update: float
    logits_sent: float
    gradients_sent: float  # of FSDP also weights

    @property
    def seconds(self) -> float:
        return (
            self.forward + self.exchange + self.loss + self.backward + self.reduction + self.update
        )

    @property
    def sent(self) -> float:
        return self.logits_sent + self.gradients_sent


@dataclass(frozen=True)
class Memory:
    """What one device holds at the end of the forward passes, in bytes."""

    weights: float
    gradients: float  # in DistributedDataParallel's buckets, where there are columns
    optimizer: float
    activations: float
    logits: float  # of all peers, and the gradients of its own

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


# --- bytes ---


def exchange_bytes(images: int, classes: int, itemsize: int) -> int:
    """One peer's logits along the peer axis: N x C numbers. Of a distance loss N x N distances:
    `exchange_bytes(images, images, itemsize)`."""
    return images * classes * itemsize


def all_reduce_bytes(nbytes: float, ranks: int) -> float:
    """What each of the ranks sends in a ring all-reduce: 2 (D - 1) / D of it."""
    return 2 * (ranks - 1) / ranks * nbytes


def gather_bytes(nbytes: float, ranks: int) -> float:
    """What each rank sends in a ring all-gather of a tensor of `nbytes` in all, or in a
    reduce-scatter of one: (D - 1) / D of it."""
    return (ranks - 1) / ranks * nbytes


def fsdp_bytes(weights: float, gradients: float, ranks: int, parts: int = 1) -> float:
    """What each rank sends of a peer that is cut over the ranks: in each part of the batch its
    weights are gathered for the forward pass and, freed in between, again for the backward pass;
    its gradients are reduced and scattered once."""
    return 2 * parts * gather_bytes(weights, ranks) + gather_bytes(gradients, ranks)


# --- seconds of one collective ---


def broadcast_seconds(nbytes: float, ranks: int, link: Link) -> float:
    """From one rank to all others along a chain, in pieces that follow each other."""
    if ranks < 2:
        return 0.0
    return link.start + (ranks - 1) * link.hop + nbytes / link.bandwidth


def all_reduce_seconds(nbytes: float, ranks: int, link: Link) -> float:
    """The faster of a ring, whose hops grow with the ranks, and of a pair of trees."""
    if ranks < 2:
        return 0.0
    ring = 2 * (ranks - 1) * link.hop + all_reduce_bytes(nbytes, ranks) / link.bandwidth
    trees = 2 * math.ceil(math.log2(ranks)) * link.hop + 2 * nbytes / link.bandwidth
    return link.start + min(ring, trees)


def gather_seconds(nbytes: float, ranks: int, link: Link) -> float:
    """Of an all-gather or a reduce-scatter of a tensor of `nbytes` in all."""
    if ranks < 2:
        return 0.0
    return link.start + (ranks - 1) * link.hop + gather_bytes(nbytes, ranks) / link.bandwidth


# --- what of it the device waits for ---


def exchange_wait(
    forwards: Sequence[float], backward: float, transfer: float, latency: float, parts: int = 1
) -> float:
    """Seconds that a row waits for logits in a step of a batch in `parts`.

    In each part the row's peers run in turn, `forwards` seconds each; when one has ended, a round
    of the exchange takes the link for `transfer` seconds and is there `latency` later. A part's
    backward passes, `backward` seconds, come after the forward passes of the next part: meanwhile
    its logits travel.
    """
    now = free = waited = 0.0
    before = None  # when the logits of the part before are there
    for _ in range(parts):
        for passed in forwards:
            now += passed
            free = max(now, free) + transfer
        if before is not None:
            wait = max(0.0, before - now)
            waited += wait
            now += wait + backward
        before = free + latency
    return waited + max(0.0, (before or 0.0) - now)


def reduction_wait(gradients: Iterable[float], backward: float, ranks: int, link: Link) -> float:
    """Seconds after the backward pass until the gradients of a row's peers are summed.

    They leave in buckets as the pass goes on, so that it hides all but what it has no time for, and
    never the last bucket, which is complete only at its end."""
    total = last = 0.0
    for nbytes in gradients:
        times = [all_reduce_seconds(bucket, ranks, link) for bucket in buckets(nbytes)]
        total += sum(times)
        last = max(last, times[-1] if times else 0.0)
    return max(last, total - backward)


def buckets(nbytes: float) -> list[float]:
    """Sizes of the buckets that DistributedDataParallel makes of so many bytes of gradients, in the
    order in which they are sent."""
    found: list[float] = []
    rest = nbytes
    while rest > 0:
        found.append(min(rest, BUCKET if found else FIRST_BUCKET))
        rest -= found[-1]
    return found


def fsdp_wait(
    peers: Sequence[PeerCost], forward: float, backward: float, ranks: int, link: Link, parts: int
) -> float:
    """The same of peers that are cut over the ranks, with the waits for weights, of a batch in
    `parts` whose passes take `forward` and `backward` seconds. A unit is gathered while the one
    before it computes: what is left is the largest unit, or what the passes have no time for."""
    units = [unit for peer in peers for unit in peer.units or (peer.weights,)]
    gathers = [gather_seconds(unit, ranks, link) for unit in units]
    first, total = max(gathers), sum(gathers)
    a_part = max(first, total - forward) + max(first, total - backward)
    return parts * a_part + max(first, total - max(0.0, backward - total))


# --- links along the axes ---


def link_along_data(layout: Layout, inside: Link, between: Link) -> Link:
    """Of the groups along the data axis. A row that goes over several nodes passes from each to the
    next once; rows that have devices on the same node then share what joins it to the others."""
    a_node = layout.devices // layout.nodes
    if layout.data <= a_node and a_node % layout.data == 0:
        return inside
    return between.shared(1 if layout.data % a_node == 0 else 2)


def link_along_peer(layout: Layout, inside: Link, between: Link) -> Link:
    """Of the groups along the peer axis: columns with devices on the same node share what joins it
    to the others."""
    if layout.nodes == 1:
        return inside
    return between.shared(layout.columns_a_node())


# --- a whole step ---


@dataclass(frozen=True)
class Batch:
    """What a step computes: `images` of the whole batch, cut by column and then in `parts`."""

    images: int
    classes: int
    itemsize: int = 4  # bytes of a logit: 4 of float32, 2 of bf16 and fp16
    parts: int = 1

    def share(self, data: int) -> int:
        """Images of the largest share of so many columns."""
        return -(-self.images // data)


def step(
    peers: Sequence[PeerCost],
    layout: Layout,
    batch: Batch,
    link: Link,
    network: Link | None = None,
    loss: Line = NOTHING,
) -> Step:
    """The slowest row's step, which is the mesh's: rows wait for each other's logits.

    link: between devices of a node. network: between nodes (default: `link`). loss: seconds of the
    loss of all K peers' logits, of so many images.
    """
    rows = [
        _step_of_row(row, peers, layout, batch, link, network or link, loss)
        for row in range(layout.peer)
    ]
    return max(rows, key=lambda row: row.seconds)


def _step_of_row(
    row: int,
    peers: Sequence[PeerCost],
    layout: Layout,
    batch: Batch,
    link: Link,
    network: Link,
    loss: Line,
) -> Step:
    P, D, parts = layout.peer, layout.data, batch.parts
    own = [peers[k] for k in layout.of_row(row)]
    share = batch.share(D)
    images = share / parts  # of a part
    forwards = [peer.forward(images) for peer in own]
    forward, backward = sum(forwards), sum(peer.backward(images) for peer in own)

    along_peer = link_along_peer(layout, link, network)
    nbytes = exchange_bytes(share, batch.classes, batch.itemsize) if P > 1 else 0
    received = (len(peers) - len(own)) * nbytes / parts
    if P > 1:
        transfer = received / len(own) / along_peer.bandwidth
        latency = broadcast_seconds(0, P, along_peer)
        exchange = exchange_wait(forwards, backward, transfer, latency, parts)
    else:
        exchange = 0.0

    along_data = link_along_data(layout, link, network)
    if layout.fsdp:
        reduction = fsdp_wait(own, forward, backward, D, along_data, parts)
        sent = sum(fsdp_bytes(p.weights, p.gradients, D, parts) for p in own)
    else:
        reduction = reduction_wait((p.gradients for p in own), backward, D, along_data)
        sent = sum(all_reduce_bytes(p.gradients, D) for p in own)
    return Step(
        forward=parts * forward,
        exchange=exchange,
        loss=parts * loss(images),
        backward=parts * backward,
        reduction=reduction,
        update=sum(peer.update for peer in own) / (D if layout.fsdp else 1),
        logits_sent=float(len(own) * nbytes),
        gradients_sent=sent,
    )


# --- memory ---


def memory(peers: Sequence[PeerCost], layout: Layout, batch: Batch) -> Memory:
    """Of the device that holds most. Not in it: the images, the allocator's reserve, workspaces of
    libraries and the context of the driver."""
    rows = [_memory_of_row(row, peers, layout, batch) for row in range(layout.peer)]
    return max(rows, key=lambda row: row.total)


def _memory_of_row(row: int, peers: Sequence[PeerCost], layout: Layout, batch: Batch) -> Memory:
    D = layout.data
    own = [peers[k] for k in layout.of_row(row)]
    images = -(-batch.share(D) // batch.parts)
    cut = D if layout.fsdp else 1
    weights, gradients = sum(p.weights for p in own), sum(p.gradients for p in own)
    whole = 0
    if layout.fsdp and D > 1:  # of the unit that computes and the one gathered behind it
        for p in own:
            unit = max(p.units or (p.weights,))
            whole = max(whole, min(2 * unit, p.weights) + min(unit, p.gradients))
    held = gradients / cut
    if cut > 1 and batch.parts > 1:
        held += gradients  # which the parts add up whole
    logits = exchange_bytes(images, batch.classes, batch.itemsize)
    return Memory(
        weights=weights / cut + whole,
        gradients=held,
        optimizer=sum(p.optimizer for p in own) / cut,
        activations=sum(p.activations(images) for p in own),
        logits=float((len(peers) + len(own)) * logits),
    )
