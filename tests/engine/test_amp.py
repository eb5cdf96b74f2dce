"""Which precision "auto" chooses."""

from __future__ import annotations

import pytest
import torch

from fastdml.engine.amp import LossScale, resolve_amp

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "name"),
    [
        ({}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_on_cpu_uses_bf16_where_the_cpu_has_it(monkeypatch, capabilities, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    amp = resolve_amp("auto", CPU)
    assert amp.name == name
    assert amp.scaler is None


@pytest.mark.parametrize(
    ("capability", "name"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_on_cuda_follows_the_compute_capability(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("fastdml.engine.amp.LossScale", lambda device: f"scaler on {device}")
    amp = resolve_amp("auto", CUDA)
    assert amp.name == name
    assert amp.scaler == ("scaler on cuda" if name == "fp16" else None)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_in_the_named_precision(name, dtype):
    amp = resolve_amp("off" if name == "fp32" else name, CPU)
    with amp.autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert amp.name == name
    assert (amp.scaler is not None) == (name == "fp16")


def test_the_scale_is_torchs_grad_scalers(monkeypatch):
    """The same decisions from the same overflows, over more steps than the growth interval."""
    torchs = torch.amp.GradScaler("cpu")
    assert torchs.get_growth_interval() == LossScale.INTERVAL
    assert torchs.get_growth_factor() == LossScale.GROWTH
    assert torchs.get_backoff_factor() == LossScale.BACKOFF
    monkeypatch.setattr(LossScale, "INTERVAL", 50)
    ours = LossScale(CPU, init=2.0**10)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=LossScale.INTERVAL)
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], 0.0)
    for step in range(LossScale.INTERVAL + 30):
        gradient = torch.full((3,), torch.inf if step in (2, 3, 17) else 512.0)
        weight.grad = gradient.clone()
        theirs.scale(torch.ones(()))
        theirs.unscale_(optimizer)
        found = ours.unscale_([gradient])
        assert torch.equal(gradient, weight.grad)
        assert found == (1 if step in (2, 3, 17) else 0)
        theirs.step(optimizer)
        theirs.update()
        ours.update_(found)
        assert ours.scale == theirs.get_scale()
    assert ours.scale == 2.0**8  # three overflows halve, the interval after them doubles


def test_a_scale_is_loaded_in_place():
    first, second = LossScale(CPU), LossScale(CPU)
    first.update_(torch.ones(()))
    tensors = second.tensors()
    second.load_state_dict(first.state_dict())
    assert [id(t) for t in second.tensors()] == [id(t) for t in tensors]
    assert second.scale == first.scale == 2.0**15
