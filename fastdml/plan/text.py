"""A plan as tables, with what it assumes, and the command that follows from it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from fastdml.plan.meshes import Candidate, Plan
from fastdml.units import milliseconds, size

MESHES = ("mesh", "devices", "step ms", "speed-up", "images/s", "waits ms", "memory", "sends")


def describe(plan: Plan, device: str, command: Sequence[str], *, measured: bool) -> str:
    """device: that measured, if any. command: `fastdml train`, its options but for the mesh."""
    from fastdml.report.tables import fixed_columns

    whole, share = plan.batch.images, plan.batch.share(max(c.layout.data for c in plan.candidates))
    images = list(dict.fromkeys((whole, share)))
    peers = [
        ("peer", "weights", "gradients", "optimizer", "activations",
         *(f"ms a step of {n}" for n in images)),
        *(
            (p.name, size(p.weights), size(p.gradients), size(p.optimizer),
             size(p.activations(whole)), *(milliseconds(p.seconds(n)) for n in images))
            for p in plan.peers
        ),
    ]  # fmt: skip
    devices = max(c.layout.devices for c in plan.candidates)
    shown = [c for c in plan.candidates if c.layout.devices in (1, devices) or c is plan.best]
    meshes = [MESHES, *(_row(plan, c) for c in shown)]
    source = f"measured, eager, each peer alone, on {device}" if measured else "given"
    source += f"; logits of {plan.batch.itemsize} bytes"
    parts = [
        f"times of a step: {source}",
        fixed_columns(peers, text=(0,)),
        fixed_columns(meshes, text=(0,)),
        _notes(plan, not any(peer.forward.fixed for peer in plan.peers)),
        recommendation(plan, command),
    ]
    return "\n\n".join(parts)


def _row(plan: Plan, c: Candidate) -> tuple[str, ...]:
    step = c.step
    return (
        c.mesh + " with FSDP" * c.layout.fsdp,
        str(c.layout.devices),
        milliseconds(step.seconds),
        f"{plan.speedup(c):.2f}x",
        f"{plan.batch.images / step.seconds:,.0f}",
        milliseconds(step.exchange + step.reduction),
        size(c.memory.total) + ("" if c.fits else ", too much"),
        size(step.sent),
    )


def _notes(plan: Plan, half_is_half: bool) -> str:
    nodes = max(c.layout.nodes for c in plan.candidates)
    lines = []
    if half_is_half:
        lines.append("half a batch is taken to take half the time, as no --share-ms says otherwise")
    lines += [
        "predictions: of the slowest row; waits: for logits and gradients, part of the step",
        "memory: of the device that holds most, without images, driver and reserves; sends: a step",
        f"link {plan.link.name}: {plan.link.source}",
    ]
    if nodes > 1:
        lines.append(f"network {plan.network.name}, one a node: {plan.network.source}")
    if not math.isinf(plan.device_memory):
        lines.append(f"a device has {size(plan.device_memory)}")
    return "\n".join(lines)


def recommendation(plan: Plan, command: Sequence[str]) -> str:
    best = plan.best
    if best is None:
        return (
            "no mesh of these fits into a device's memory: more devices, a smaller batch, or more "
            "parts (--accumulate)"
        )
    line = f"recommended: {best.mesh}{' with FSDP' * best.layout.fsdp}"
    if best.layout.devices == 1:
        return f"{line}, a single device: no mesh is faster\n  {shlex.join(command)}"
    line += f", {plan.speedup(best):.2f}x a single device"
    homes = [
        f"{' '.join(plan.peers[k].name for k in best.layout.of_row(row))}"
        for row in range(best.layout.peer)
    ]
    if best.layout.peer > 1:
        line += f"; rows: {' | '.join(homes)}"
    lines = [line]
    if best.layout.data > 1:
        lines.append(
            f"each column's BatchNorm sees {plan.batch.share(best.layout.data) // plan.batch.parts}"
            " images, unless --sync-batchnorm is given"
        )
    return "\n".join([*lines, *(f"  {text}" for text in commands(best, command))])


def commands(best: Candidate, command: Sequence[str]) -> list[str]:
    """What starts it: on one node fastdml itself, on several torchrun on each of them."""
    layout = best.layout
    options = ["--mesh", best.mesh, *(["--fsdp"] if layout.fsdp else [])]
    if layout.nodes == 1:
        return [shlex.join([*command, *options])]
    a_node = layout.devices // layout.nodes
    module = ["-m", "fastdml", *command[1:], *options]
    return [
        f"torchrun --nnodes {layout.nodes} --nproc-per-node {a_node} --node-rank $NODE_RANK "
        f"--master-addr $MASTER_ADDR --master-port 29500 {shlex.join(module)}"
    ]
