"""Networks of torchvision and timm on two ranks, with dropout, stochastic depth and outputs that
are more than logits, in a usual loop over a DataLoader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import Cohort, MutualLoss
from fastdml.engine import make_step
from fastdml.parallel import make_mesh

pytestmark = pytest.mark.slow
C, SIDE = 10, 64


def networks() -> list[nn.Module]:
    import timm
    import torchvision

    torch.manual_seed(0)
    vision = torchvision.models
    return [
        vision.mobilenet_v2(num_classes=C),  # dropout
        vision.googlenet(num_classes=C, init_weights=True),  # returns auxiliary logits too
        vision.efficientnet_b0(num_classes=C),  # stochastic depth
        timm.create_model("vit_tiny_patch16_224", num_classes=C, img_size=SIDE, drop_path_rate=0.2),
    ]


def logits(out: Any) -> Tensor:
    return getattr(out, "logits", out)


def loop(peer: int, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = make_mesh(peer, timeout=60)
    cohort = Cohort(networks(), C)
    mesh.distribute(cohort, keep="exchange" in options)
    optimizer = torch.optim.AdamW(cohort.parameters(), lr=1e-3)
    step = make_step(
        cohort, MutualLoss(), optimizer, amp="off", output=logits, mesh=mesh, **options
    )
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, 3, SIDE, SIDE), torch.randint(C, (24,)))
    order = torch.Generator().manual_seed(2)
    losses = []
    for images, labels in DataLoader(data, batch_size=8, shuffle=True, generator=order):
        losses.append(step(images, labels).losses)
    return {
        "weights": weights(cohort),
        "losses": torch.stack(losses)[:, list(mesh.local)],
        "local": [*mesh.local],
        "drawing": sorted(step.drawing),
    }


def three_ways(peer: int) -> list[dict[str, Any]]:
    return [loop(peer), loop(peer, accumulate=2), loop(peer, exchange="weights")]


def test_networks_of_others_train_bit_for_bit_as_on_one_rank():
    (alone,) = run_ranks(1, three_ways, 1, timeout=300)
    for rank in run_ranks(2, three_ways, 2, timeout=300):
        for found, whole in zip(rank, alone, strict=True):
            assert found["weights"]
            for n, t in found["weights"].items():
                assert torch.equal(t, whole["weights"][n]), n
            assert torch.equal(found["losses"], whole["losses"][:, found["local"]])
            assert found["drawing"] == [0, 1, 2, 3]  # GoogLeNet has dropout too
