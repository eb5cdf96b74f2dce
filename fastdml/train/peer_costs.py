"""The time that each peer's forward and backward pass takes by itself, measured once at the start.

On copies, and without a trace in the random generators. Costs a few passes of each peer, of a slow
one a single pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdml.engine.amp import Amp
from fastdml.train.checks import copied

ROUNDS, ENOUGH = 8, 0.5  # peers take turns so many times, or until so many seconds are over


def peer_seconds(peers: Sequence[nn.Module], inputs: Tensor, amp: Amp) -> list[float] | None:
    """Seconds a batch `inputs` (N, ...) of each peer, in training mode, the fastest of a few; None
    where peers cannot be copied, or fail by themselves. Waits for the device."""
    device = amp.device
    inputs = inputs.clone() if inputs.is_inference() else inputs
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        twins = [twin for peer in peers if (twin := copied(peer)) is not None]
        if len(twins) < len(peers):
            return None
        start = time.perf_counter()
        rounds: list[list[float]] = []
        try:
            while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - start < ENOUGH):
                rounds.append([_seconds(twin, inputs, amp) for twin in twins])
        except Exception:  # no run ends because of this, such as for a lack of memory for copies
            return None
    return [min(times) for times in zip(*rounds, strict=True)]


def _seconds(peer: nn.Module, inputs: Tensor, amp: Amp) -> float:
    start = time.perf_counter()
    with amp.autocast():
        logits = peer(inputs)
    if logits.requires_grad:  # else the peer only teaches
        logits.float().sum().backward()
    if amp.device.type == "cuda":
        torch.cuda.synchronize(amp.device)
    return time.perf_counter() - start
