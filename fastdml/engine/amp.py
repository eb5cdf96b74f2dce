"""Mixed precision: which dtype the networks compute in, and fp16's gradient scaler.

The loss computes in fp32 whatever the dtype. bf16 has fp32's range and needs no scaler. fp16 has
one scaler for the whole cohort: an overflow in any peer skips the update of all that step with it,
so the peers stay in step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.amp import GradScaler

from fastdml.errors import InputError

_NAMES = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Amp:
    device: torch.device
    dtype: torch.dtype | None  # None: no autocast
    scaler: GradScaler | None  # with fp16 alone

    @property
    def name(self) -> str:
        return _NAMES[self.dtype]

    def autocast(self) -> AbstractContextManager:
        """A fresh context each time: its cache of cast weights must not outlive an update."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def resolve(amp: str, device: torch.device) -> Amp:
    """ "auto" becomes the fastest precision that trains safely on this device."""
    if amp == "auto":
        amp = _fastest(device)
    if amp == "off":
        return Amp(device, None, None)
    if amp == "bf16":
        return Amp(device, torch.bfloat16, None)
    if amp == "fp16":
        return Amp(device, torch.float16, GradScaler(device.type))
    raise InputError(f"amp must be one of auto, off, bf16, fp16, not {amp!r}")


def _fastest(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":
        # A CPU without these instructions emulates bf16, slower than fp32.
        has = torch.cpu.get_capabilities()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "off"
    return "off"
