"""The meshes that a number of devices allows, what each costs, and which is the best of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdml.errors import InputError
from fastdml.parallel.placement import place
from fastdml.plan import costs
from fastdml.plan.costs import NOTHING, Batch, Layout, Line, Memory, PeerCost, Step
from fastdml.plan.links import Link


@dataclass(frozen=True)
class Candidate:
    """A mesh, and what a step on it would take."""

    layout: Layout
    step: Step
    memory: Memory  # of the device that holds most
    fits: bool  # in a device's memory, as far as that is known

    @property
    def mesh(self) -> str:
        """As the setting `mesh` takes it."""
        return f"peer={self.layout.peer},data={self.layout.data}"


@dataclass(frozen=True)
class Plan:
    """What a cohort costs on each mesh. All times are predictions from a single device's."""

    peers: Sequence[PeerCost]
    batch: Batch
    single: Candidate  # one device
    candidates: Sequence[Candidate]  # the fastest first
    best: Candidate | None  # None: nothing fits
    link: Link
    network: Link  # between nodes
    device_memory: float  # bytes; infinity where it is not known

    def speedup(self, candidate: Candidate) -> float:
        return self.single.step.seconds / candidate.step.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values: seconds and bytes."""
        return {
            "peers": [dataclasses.asdict(peer) for peer in self.peers],
            "batch": dataclasses.asdict(self.batch),
            "link": dataclasses.asdict(self.link),
            "network": dataclasses.asdict(self.network),
            "candidates": [
                {
                    "mesh": c.mesh,
                    "devices": c.layout.devices,
                    "nodes": c.layout.nodes,
                    "rows": list(c.layout.rows),
                    "fsdp": c.layout.fsdp,
                    "seconds": c.step.seconds,
                    "speedup": self.speedup(c),
                    "step": dataclasses.asdict(c.step),
                    "memory": {**dataclasses.asdict(c.memory), "total": c.memory.total},
                    "fits": c.fits,
                }
                for c in self.candidates
            ],
            "best": self.best and self.best.mesh,
        }


def plan_meshes(
    peers: Sequence[PeerCost],
    gpus: int,
    batch: Batch,
    link: Link,
    *,
    nodes: int = 1,
    network: Link | None = None,
    device_memory: float = math.inf,
    loss: Line = NOTHING,
) -> Plan:
    """Every mesh of `gpus` devices, or of a part of them, with the fastest that fits as its best.

    nodes: how many machines the devices are on, evenly. link: between devices of a node. network:
    between nodes (default: `link`). device_memory: bytes of a device. loss: seconds of the loss of
    so many images. Where peers fit in no mesh otherwise, those with FSDP are among the meshes.

    Raises InputError where the devices do not go evenly on the nodes.
    """
    for name, number in (("gpus", gpus), ("nodes", nodes)):
        if number < 1:
            raise InputError(f"{name} must be 1 or more, not {number!r}")
    if gpus % nodes:
        raise InputError(f"{gpus} devices do not go evenly on {nodes} nodes: change gpus or nodes")

    def of(layout: Layout) -> Candidate:
        memory = costs.memory(peers, layout, batch)
        step = costs.step(peers, layout, batch, link, network, loss)
        return Candidate(layout, step, memory, memory.total <= device_memory)

    found = [of(layout) for layout in layouts(peers, gpus, batch, nodes)]
    if not any(candidate.fits for candidate in found):
        cut = [dataclasses.replace(c.layout, fsdp=True) for c in found if c.layout.data > 1]
        found += [of(layout) for layout in cut]
    found.sort(key=lambda c: (c.step.seconds, c.layout.devices, c.layout.peer))
    single = next(c for c in found if c.layout.devices == 1)
    best = next((c for c in found if c.fits), None)
    return Plan(peers, batch, single, found, best, link, network or link, device_memory)


def layouts(peers: Sequence[PeerCost], gpus: int, batch: Batch, nodes: int) -> list[Layout]:
    """One for each mesh of a divisor of the devices, with the peers balanced over its rows."""
    found = []
    a_node = gpus // nodes
    for devices in (d for d in range(1, gpus + 1) if gpus % d == 0):
        on = math.ceil(devices / a_node)
        if devices % on:
            continue
        for rows in (r for r in range(1, len(peers) + 1) if devices % r == 0):
            data = devices // rows
            if data * batch.parts <= batch.images:
                seconds = [peer.seconds(batch.share(data)) for peer in peers]
                found.append(Layout(place(len(peers), rows, seconds), data, on))
    return found
