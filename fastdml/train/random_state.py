"""The global generators that peers draw from, as dropout does; data loading has its own."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the host's generator and the device's, and those of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Tensor | None]:
    """The state of both, for a checkpoint: bytes on the host; "cuda" is None without one."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    """What `rng_state` gave, on whatever device that was."""
    cpu, cuda = state["cpu"], state["cuda"]
    if cpu is None:
        raise ValueError("no state of the host's generator")
    torch.set_rng_state(cpu)
    if device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
