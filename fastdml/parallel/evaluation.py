"""A forward pass of all peers, wherever they are, for evaluations.

The ranks of a column, which hold all peers between them, call these together on the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdml.cohort import REMEDY, check_logits
from fastdml.parallel.exchange import Exchange, Kind

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.parallel.mesh import Mesh


def forward(cohort: Cohort, images: Tensor) -> tuple[Tensor, ...]:
    """K logits (N, C) of images (N, ...), on all ranks: `cohort(images)`. Where peers are on other
    rows, all are float32, and gradients end at them."""
    mesh = cohort.mesh
    if mesh is None or mesh.peer == 1:
        return cohort(images)
    own = {}
    for k in mesh.local:
        logits = cohort.peers[k](images)
        check_logits(cohort.names[k], logits, images, cohort.num_classes, REMEDY)
        own[k] = logits.float()
    return exchanged(mesh, own, {k: (len(images), cohort.num_classes) for k in range(len(cohort))})


def exchanged(
    mesh: Mesh, own: Mapping[int, Tensor], shapes: Mapping[int, tuple[int, ...]]
) -> tuple[Tensor, ...]:
    """The float32 tensors of all peers, in order, from those of the local ones, by peer. shapes: of
    all."""
    exchange = Exchange(mesh)
    kinds = {k: Kind(shapes[k], torch.float32) for k in exchange.remote}
    transfer = exchange.begin(kinds)
    for k, tensor in own.items():
        transfer.give(k, tensor)
    found = {**own, **transfer.wait()}
    return tuple(found[k] for k in range(len(shapes)))


@contextmanager
def answering(cohort: Cohort) -> Iterator[None]:
    """Inside, `cohort(images)` gives the logits of all peers on every rank, as `forward` does."""
    if cohort.mesh is None or cohort.mesh.peer == 1:
        yield
        return
    cohort.forward = partial(forward, cohort)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del cohort.forward
