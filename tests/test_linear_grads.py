"""Weight gradients of half-precision layers are added up in float32, without a second (C, D)."""

from __future__ import annotations

import pytest
import torch
from fastdml_kernels import linear_grads, linear_loss
from fastdml_kernels.linear_grads import add_product
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdml import linear_mutual_loss


class Watch(TorchDispatchMode):
    """Notes each operator, and the bytes of every product that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.products: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        if func is torch.ops.aten.addmm.dtype_out:
            return kwargs["out"]
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products.append(result.numel() * result.element_size())
        return result


def parts(dtype, device="cpu", n=5, C=300, D=7):
    g = torch.Generator().manual_seed(0)
    slope, hidden = (torch.randn(n, size, generator=g).to(dtype) for size in (C, D))
    return slope.to(device), hidden.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [1, 7, 900])  # 900: one class is more than a block
def test_blocks_of_classes_give_the_product(dtype, D, monkeypatch):
    monkeypatch.setitem(linear_grads.BLOCK_BYTES, "cpu", 1 << 10)
    slope, hidden = parts(dtype, D=D)
    total = torch.ones(300, D)
    with Watch() as watch:
        add_product(total, slope, hidden)
    expected = 1 + slope.double().t() @ hidden.double()
    torch.testing.assert_close(total.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    assert len(watch.products) > 1 or D == 1
    assert max(watch.products) <= max(1 << 10, 2 * D)


def test_cublas_adds_to_the_float32_total_itself():
    with FakeTensorMode():
        slope, hidden = parts(torch.bfloat16, "cuda")
        total = torch.ones(300, 7, device="cuda")
        with Watch() as watch:
            add_product(total, slope, hidden)
    assert watch.operators[-1] == "aten.addmm.dtype_out"
    assert not watch.products


def test_rocm_takes_blocks(monkeypatch):
    """Whether its libraries add bfloat16 products in float32 depends on the build."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with FakeTensorMode():
        slope, hidden = parts(torch.bfloat16, "cuda")
        total = torch.ones(300, 7, device="cuda")
        with Watch() as watch:
            add_product(total, slope, hidden)
    assert "aten.addmm.dtype_out" not in watch.operators
    assert watch.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_add_to_the_weights_gradient_in_place(dtype):
    """No (C, D) is made beside it, which for a vocabulary is as large as the weight."""
    hidden, weight = ([torch.randn(n, 3, dtype=dtype) for _ in range(2)] for n in (12, 7))
    for t in (*hidden, *weight):
        t.requires_grad_()
    seen = []

    def watched(total, *rest):
        with Watch() as watch:
            add_product(total, *rest)
        seen.append((watch.operators[-1], watch.products))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "add_product", watched)
        linear_mutual_loss(hidden, weight, torch.arange(12) % 7, chunk_rows=4)
    assert seen == [("aten.addmm_.default", [])] * 6  # of 2 peers and 3 chunks
