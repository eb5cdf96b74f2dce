"""Torch devices: the one that a name means, and the hardware behind it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fastdml.errors import InputError
from fastdml.units import count_of_threads


def choose_device(name: str) -> torch.device:
    """The device called "auto" (cuda where there is one, else cpu), "cpu", "cuda" or "cuda:N".
    Raises InputError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, TypeError, ValueError):
        pass
    raise InputError(f"no run on device {name!r} here: use {_devices()}")


def _devices() -> str:
    """The names of the devices that there are, for a message."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return "auto or cpu; torch finds no CUDA device"
    return "auto, cpu, cuda or " + ("cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}")


def device_name(device: str | torch.device, threads: int | None = None) -> str:
    """The hardware behind a torch device, as a table names it; of a CPU with the number of threads,
    by default torch's."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((v.strip() for k, _, v in fields if k.strip() == "model name"), model)
    return f"{model}, {count_of_threads(threads or torch.get_num_threads())}"
