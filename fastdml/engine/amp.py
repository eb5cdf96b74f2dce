"""Mixed precision: which dtype the networks compute in, and fp16's gradient scaler.

The loss computes in fp32 whatever the dtype. bf16 has fp32's range and needs no scaler. fp16 has
one scaler for the whole cohort; a peer whose gradients overflow skips its own update (see
`fastdml.engine.update`), and the scale comes down for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastdml.errors import InputError
from fastdml.torch_private import unscale_, update_scale_

AmpName = Literal["auto", "off", "bf16", "fp16"]
_NAMES = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class LossScale:
    """What torch's GradScaler does, a peer at a time, with everything on the device.

    GradScaler keeps one overflow flag for an optimizer; here every peer has its own, and one
    optimizer serves them all. The scale halves at an overflow and doubles after 2000 training
    steps without one, as GradScaler's does.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device, init: float = 2.0**16) -> None:
        self.scale = torch.full((), init, dtype=torch.float32, device=device)
        self.steps = torch.zeros((), dtype=torch.int32, device=device)  # since the last change

    def unscale_(self, grads: Sequence[Tensor]) -> Tensor:
        """Divides by the scale in place; 0-d, 1 where a gradient was not finite, else 0."""
        found = torch.zeros_like(self.scale)
        inverse = self.scale.double().reciprocal().float()
        of_dtype = defaultdict(list)
        for grad in grads:
            of_dtype[grad.dtype].append(grad)
        for same in of_dtype.values():
            unscale_(same, found, inverse)
        return found

    def update_(self, found: Tensor) -> None:
        update_scale_(self.scale, self.steps, found, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def tensors(self) -> list[Tensor]:
        return [self.scale, self.steps]

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(state["scale"])
        self.steps.copy_(state["steps"])


@dataclass(frozen=True)
class Amp:
    device: torch.device
    dtype: torch.dtype | None  # None: no autocast
    scaler: LossScale | None  # with fp16 alone

    @property
    def name(self) -> str:
        return _NAMES[self.dtype]

    def autocast(self) -> AbstractContextManager:
        """Without the cache of cast weights: each is used once, and must not outlive an update or,
        captured, a graph."""
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False
        )


def resolve_amp(amp: AmpName, device: torch.device) -> Amp:
    """ "auto" becomes the fastest precision that trains safely on this device."""
    if amp == "auto":
        amp = _fastest(device)
    if amp == "off":
        return Amp(device, None, None)
    if amp == "bf16":
        return Amp(device, torch.bfloat16, None)
    if amp == "fp16":
        return Amp(device, torch.float16, LossScale(device))
    raise InputError(f"amp must be one of auto, off, bf16, fp16, not {amp!r}")


def _fastest(device: torch.device) -> AmpName:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":
        # A CPU without these instructions emulates bf16, slower than fp32.
        has = torch.cpu.get_capabilities()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "off"
    return "off"
