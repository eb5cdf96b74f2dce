"""The data axis with networks that others wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.parallel import Mesh, make_mesh, total

C, N = 10, 8


def peers() -> Cohort:
    import timm
    import torchvision

    torch.manual_seed(0)
    return Cohort(
        [
            torchvision.models.shufflenet_v2_x0_5(num_classes=C),
            torchvision.models.squeezenet1_1(num_classes=C),  # dropout, no BatchNorm
            timm.create_model("mobilenetv3_small_050", num_classes=C, drop_path_rate=0.2),
        ],
        C,
    )


def batch(step: int, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, 3, 64, 64, generator=generator)
    y = torch.randint(C, (N,), generator=generator)
    own = slice(N * mesh.column // mesh.data, N * (mesh.column + 1) // mesh.data)
    return x[own], y[own]


def trained(data: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = make_mesh(1, data, timeout=60)
    cohort = peers()
    mesh.distribute(cohort)
    step = make_step(
        cohort,
        MutualLoss(),
        make_optimizer(cohort, lr=0.01),
        amp="off",
        mesh=mesh,
        accumulate=2 // data,
    )
    losses = [total(step(*batch(i, mesh)), mesh).losses for i in range(3)]
    weights = {n: w.detach().clone() for n, w in cohort.named_parameters()}
    return {"losses": torch.stack(losses), "weights": weights}


def refused(data: int) -> str:
    import torchvision

    mesh = make_mesh(1, data, timeout=60)
    torch.manual_seed(0)
    network = torchvision.models.googlenet(num_classes=C, aux_logits=True, init_weights=False)
    cohort = Cohort([network, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, C))], C)
    mesh.distribute(cohort)
    step = make_step(
        cohort,
        MutualLoss(),
        make_optimizer(cohort, lr=0.01),
        mesh=mesh,
        output=lambda out: out if isinstance(out, torch.Tensor) else out.logits,
    )
    with pytest.raises(InputError) as error:
        step(*batch(0, mesh))
    return str(error.value)


@pytest.mark.slow
def test_two_columns_are_two_parts_bit_for_bit():
    pytest.importorskip("timm")
    alone = run_ranks(1, trained, 1, timeout=180)[0]
    for rank in run_ranks(2, trained, 2, timeout=180):
        assert torch.equal(rank["losses"], alone["losses"])
        for name, w in alone["weights"].items():
            assert torch.equal(rank["weights"][name], w), name


@pytest.mark.slow
def test_heads_that_are_not_used_are_refused_by_name():
    pytest.importorskip("torchvision")
    for message in run_ranks(2, refused, 2, timeout=180):
        assert message.startswith("peer GoogLeNet: ")
        assert "(aux1.conv.conv.weight, aux1.conv.bn.weight, " in message
