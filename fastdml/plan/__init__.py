"""What a cohort would cost on a mesh of devices: memory, time of a step, traffic; and which mesh is
the best.

    plan = fastdml.plan.make_plan(["resnet32"] * 4, gpus=8, link="nvlink")
    print(plan.best.mesh, plan.best.step.seconds)

Bytes are counted; seconds are predicted from those of a single device, which are measured here or
given. docs/scaling.md has the formulas and how well they have held.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdml.plan.costs import Batch, Layout, Line, Memory, PeerCost, Step
from fastdml.plan.links import LINKS, Link, find_link
from fastdml.plan.meshes import Candidate, Plan, plan_meshes

__all__ = [
    "LINKS",
    "Batch",
    "Candidate",
    "Layout",
    "Line",
    "Link",
    "Memory",
    "PeerCost",
    "Plan",
    "Step",
    "find_link",
    "make_plan",
    "plan_meshes",
]


def make_plan(
    peers: Sequence[str],
    gpus: int,
    link: str | Link,
    *,
    nodes: int = 1,
    network: str | Link = "ethernet100",
    num_classes: int = 100,
    image_shape: Sequence[int] = (3, 32, 32),
    batch_size: int = 64,
    accumulate: int = 1,
    optimizer: str = "sgd",
    amp: str = "auto",
    step_ms: Sequence[float] | None = None,
    share_ms: Sequence[float] | None = None,
    memory_gb: float | None = None,
    device: str = "auto",
) -> Plan:
    """Plans the training of a cohort on `gpus` devices.

    peers: names of models. link: between the devices of a node, network: between nodes; names of
    `LINKS`, or what was measured. batch_size: images of the whole batch.
    step_ms: milliseconds of a step of each peer alone on one device, with the whole batch. None:
        measured on this machine's `device`, eager, which costs some seconds a model.
    share_ms: the same with the smallest share, batch_size / gpus images (rounded up), from which it
        is known what of a step does not shrink with the batch. None: all of it does.
    memory_gb: of a device, in 1e9 bytes. None: a CUDA device's own where steps are measured on it;
        else nothing is ruled out.

    Raises InputError for names and values that are wrong.
    """
    from fastdml.plan.inputs import checked_inputs, costs_of

    inside, between = (find_link(one) if isinstance(one, str) else one for one in (link, network))
    inputs = checked_inputs(
        peers=peers, gpus=gpus, num_classes=num_classes, image_shape=image_shape,
        batch_size=batch_size, accumulate=accumulate, optimizer=optimizer, amp=amp,
        step_ms=step_ms, share_ms=share_ms, memory_gb=memory_gb, device=device,
    )  # fmt: skip
    costs, loss = costs_of(inputs)
    batch = Batch(batch_size, num_classes, inputs.itemsize, accumulate)
    return plan_meshes(
        costs, gpus, batch, inside, nodes=nodes, network=between, loss=loss,
        device_memory=inputs.device_memory,
    )  # fmt: skip
