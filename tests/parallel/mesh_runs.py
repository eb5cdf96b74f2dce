"""Short runs of tiny peers on a mesh and in one process, for the tests of steps on a mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.execution import StepOutput
from fastdml.loss import MutualLoss
from fastdml.parallel import Mesh

C, SIDE, N, STEPS = 4, 5, 8, 30


def network(seed: int, width: int, drop: float = 0.0, **options: Any) -> nn.Module:
    """Convolution, BatchNorm, dropout if asked, and a linear layer, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            *([nn.Dropout(drop)] if drop else []),
            nn.Linear(width, C),
        ]
        return nn.Sequential(*layers).to(torch.float64)


def cohort(K: int, dtype: torch.dtype = torch.float64, drop: float = 0.0) -> Cohort:
    """K peers of different widths."""
    return Cohort([network(k, 4 + 2 * k, drop).to(dtype) for k in range(K)], C)


def batch(step: int, dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    images = torch.randn(n, 2, SIDE, SIDE, generator=g, dtype=torch.float64).to(dtype)
    return images, torch.randint(C, (n,), generator=g)


def share(batch: tuple[Tensor, ...], mesh: Mesh | None) -> tuple[Tensor, ...]:
    """The own column's rows."""
    if mesh is None:
        return batch
    n = len(batch[-1])
    own = slice(n * mesh.column // mesh.data, n * (mesh.column + 1) // mesh.data)
    return tuple(t[own] for t in batch)


def weights(cohort: Cohort) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in cohort.state_dict().items()}


def train(
    peers: Cohort,
    mesh: Mesh | None = None,
    *,
    steps: int = STEPS,
    loss: MutualLoss | None = None,
    batches: Any = batch,
    optimizer: Any = "sgd",
    rounds: bool = False,
    **options: Any,
) -> tuple[list[StepOutput], Any]:
    """Trains a cohort; its outputs step by step, and the step. rounds: tensors travel in the order
    that they have on NCCL."""
    torch.set_num_threads(1)
    if mesh is not None:
        mesh.distribute(peers, keep=options.get("exchange") == "weights")
        options["mesh"] = mesh
    else:
        options.setdefault("execution", "eager")
    options.setdefault("amp", "off")
    made = optimizer
    if isinstance(optimizer, str):
        made = make_optimizer(peers, optimizer, lr=0.1)
    step = make_step(peers, loss or MutualLoss(temperature=2.0), made, **options)
    if mesh is not None:
        step.exchange.in_rounds = rounds
    dtype = next(peers.parameters()).dtype
    return [step(*share(batches(i, dtype), mesh)) for i in range(steps)], step
