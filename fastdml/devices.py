"""The hardware behind a torch device."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fastdml.units import count_of_threads


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
