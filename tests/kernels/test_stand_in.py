"""What the host hands to the CUDA driver: the arguments of each launch, and how many there are.

Triton's real compiler and launcher run on a stand-in for the driver (`bench/stand_in`).
"""

from __future__ import annotations

import pytest
import torch
from on_stand_in import scenarios_of

from fastdml import mutual_loss


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in")


def peers(K: int, N: int, C: int, **like) -> tuple[list[torch.Tensor], torch.Tensor]:
    """K logits that want gradients, and labels."""
    logits = [torch.randn(N, C).to(**like).requires_grad_() for _ in range(K)]
    return logits, torch.randint(C, (N,))


def forward_and_backward(gpu):
    logits, labels = peers(3, 50, 70)
    losses = mutual_loss(logits, labels, ce_weight=0.5, kl_weight=2.0, temperature=3.0)
    losses.backward(torch.ones(3))
    loss, scale = gpu.launches()
    return {
        "kernels": [loss.kernel, scale.kernel],
        "logits": [z.data_ptr() for z in logits],
        "losses": losses.data_ptr(),
        "labels": labels.data_ptr(),
        "grads": [z.grad.data_ptr() for z in logits],
        "loss": {k: v for k, v in loss.arguments.items() if k != "LAYOUT"},
        "scale": scale.arguments,
    }


def test_arguments_of_register_rows(seen):
    was = seen(forward_and_backward)
    assert was["kernels"] == ["register_rows", "scale_rows"]
    got = was["loss"]
    for name in ("logits", "losses", "labels", "grads"):
        assert got[name] == was[name], name
    assert [got[name] for name in ("ce_weight", "kl_weight", "temperature")] == [0.5, 2.0, 3.0]
    assert [got[name] for name in ("N", "label_stride", "ignore_index")] == [50, 1, -100]
    assert was["scale"]["grads"] == was["grads"]
    assert was["scale"]["N"] == 50


SCENARIOS = [forward_and_backward]
