"""From names of models to their costs: the arguments of `make_plan`, checked, and measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from fastdml.data.registry import DataSet
from fastdml.devices import choose_device
from fastdml.engine.amp import AmpName, resolve_amp
from fastdml.engine.optimizers import OptimizerName
from fastdml.errors import InputError
from fastdml.models.create import check_count
from fastdml.plan import measure
from fastdml.plan.costs import NOTHING, Line, PeerCost

OPTIMIZERS = ("sgd", "adam", "adamw")  # Apex's hold what these hold


@dataclass(frozen=True)
class Inputs:
    peers: tuple[str, ...]
    num_classes: int
    image_shape: tuple[int, ...]
    images: tuple[int, int]  # of the whole batch and of its smallest share
    optimizer: OptimizerName
    precision: AmpName  # off, bf16 or fp16
    step_ms: tuple[float, ...] | None
    share_ms: tuple[float, ...] | None
    device: torch.device
    device_memory: float

    @property
    def itemsize(self) -> int:
        """Bytes of a logit, which travels in the dtype that the networks compute in."""
        return 4 if self.precision == "off" else 2


def checked_inputs(
    *,
    peers: Sequence[str],
    gpus: int,
    num_classes: int,
    image_shape: Sequence[int],
    batch_size: int,
    accumulate: int,
    optimizer: str,
    amp: str,
    step_ms: Sequence[float] | None,
    share_ms: Sequence[float] | None,
    memory_gb: float | None,
    device: str,
) -> Inputs:
    """Raises InputError for values that no plan can be made of."""
    counts = {"gpus": gpus, "num_classes": num_classes, "batch_size": batch_size}
    for name, count in {**counts, "accumulate": accumulate}.items():
        check_count(name, count)
    if isinstance(peers, str) or not peers:
        raise InputError("name the peers, such as resnet32 resnet32")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    for name, times in (("step_ms", step_ms), ("share_ms", share_ms)):
        if times is not None and (
            len(times) != len(peers) or not all(math.isfinite(t) and t > 0 for t in times)
        ):
            raise InputError(
                f"{name} must be {len(peers)} times above 0, one a peer, not "
                f"{' '.join(f'{t:g}' for t in times) or 'none'}"
            )
    if share_ms is not None and step_ms is None:
        raise InputError("share_ms is for times that are given: give step_ms too")
    if memory_gb is not None and not memory_gb > 0:
        raise InputError(f"memory_gb must be above 0, not {memory_gb!r}")
    where = choose_device(device)
    return Inputs(
        tuple(peers),
        num_classes,
        tuple(image_shape),
        (batch_size, -(-batch_size // gpus)),
        cast("OptimizerName", optimizer),
        _precision(cast("AmpName", amp), where, measured=step_ms is None),
        None if step_ms is None else tuple(step_ms),
        None if share_ms is None else tuple(share_ms),
        where,
        _device_memory(memory_gb, where, measured=step_ms is None),
    )


def shape_and_classes(
    data: DataSet, size: int | None, classes: int | None
) -> tuple[tuple[int, int, int], int]:
    """((channels, height, width), classes) of a data set; size, classes: what is given instead.
    Raises InputError where only the files tell and nothing is given, and for re-identification."""
    if data.task == "reid":
        raise InputError(
            f"a plan is of classification, not of {data.name}: give --data cifar100, --classes and "
            "--image-size"
        )
    found = data.image_shape or (3, 0, 0)
    shape = found if size is None else (found[0], size, size)
    count = data.num_classes if classes is None else classes
    if not all((*shape, count)):
        raise InputError(f"{data.name}: give --classes and --image-size, which only its files tell")
    check_count("image_size", shape[1])
    return shape, count


def _precision(amp: AmpName, device: torch.device, *, measured: bool) -> AmpName:
    """What networks compute in. Times that are given may be of any device: auto is bf16 then."""
    if not measured:
        return "bf16" if amp == "auto" else amp
    name = resolve_amp(amp, device).name
    return "off" if name == "fp32" else cast("AmpName", name)


def _device_memory(memory_gb: float | None, device: torch.device, *, measured: bool) -> float:
    if memory_gb is not None:
        return 1e9 * memory_gb
    if measured and device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return math.inf


def costs_of(inputs: Inputs) -> tuple[list[PeerCost], Line]:
    """The peers' costs, and the seconds of the loss of so many images. Measures where no times are
    given; the loss is a part of those that are."""
    images, share = inputs.images
    loss = NOTHING
    if inputs.step_ms is not None:
        seconds = measure.given_seconds(
            inputs.step_ms, images, of_share=inputs.share_ms, share=share
        )
    else:
        seconds = measure.measured_seconds(
            inputs.peers, inputs.num_classes, inputs.image_shape, (images, share),
            amp=inputs.precision, optimizer=inputs.optimizer, device=inputs.device,
        )  # fmt: skip
        loss = measure.loss_seconds(
            len(inputs.peers), inputs.num_classes, (images, share), inputs.device
        )
    peers = measure.peer_costs(
        inputs.peers, inputs.num_classes, inputs.image_shape, seconds=seconds,
        amp=inputs.precision, optimizer=inputs.optimizer,
    )  # fmt: skip
    return peers, loss
