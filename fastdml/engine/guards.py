"""What makes it wrong to run peers in another order than one after the other: communication with
other processes, random draws from a shared generator, and hooks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fastdml.errors import InputError
from fastdml.torch_private import (
    DispatchMode,
    any_tensor_has_hooks,
    has_hooks,
    hooks_on_all_modules,
)

PARALLEL = ("torch.distributed.", "torch.nn.parallel.")  # where torch's wrappers are defined


def replicated(peer: nn.Module) -> str | None:
    """The part of this peer that communicates with other processes or devices, in words; or None.

    Found are torch's wrappers and the traces that they leave in a module (DistributedDataParallel,
    DataParallel, FSDP of both kinds, `replicate`), process groups and meshes among a module's
    attributes, distributed weights, and SyncBatchNorm in a distributed job.
    """
    together = dist.is_available() and dist.is_initialized()
    for name, module in peer.named_modules():
        where = f" at {name}" if name else ""
        kinds = [k for k in type(module).__mro__ if k.__module__.startswith(PARALLEL)]
        if kinds or (together and isinstance(module, nn.SyncBatchNorm)):
            return f"{(kinds or [nn.SyncBatchNorm])[0].__name__}{where}"
        for attribute, value in vars(module).items():
            if dist.is_available() and _is_of_processes(value):
                return f"{type(value).__name__}{where} ({attribute})"
    for name, w in peer.named_parameters():
        if any(k.__module__.startswith(PARALLEL) for k in type(w).__mro__):
            return f"{type(w).__name__} at {name}"
    return None


def _is_of_processes(value: object) -> bool:
    kinds = (dist.ProcessGroup, dist.device_mesh.DeviceMesh)
    return isinstance(value, kinds)


def hooked(peers: Sequence[nn.Module]) -> bool:
    """Whether a forward or backward pass through the peers runs a hook."""
    return (
        hooks_on_all_modules()
        or any(has_hooks(m) for p in peers for m in p.modules())
        or any(any_tensor_has_hooks(p.parameters()) for p in peers)
    )


class NoCollectives(DispatchMode):
    """Within it, a collective of torch.distributed raises before it begins."""

    def __init__(self, execution: str) -> None:
        super().__init__()
        self.execution = execution

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise InputError(
                f"execution {self.execution!r} does not go with peers that talk to other processes "
                f"({func.name()}): use eager"
            )
        return func(*args, **(kwargs or {}))


class Generators:
    """The state of the global random generators: torch's on the host and on `device`, numpy's and
    Python's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.states = self._now()

    def _now(self) -> tuple[Any, ...]:
        cuda = None if self.device is None else torch.cuda.get_rng_state(self.device).tolist()
        numpys = np.random.get_state(legacy=False)
        keys = numpys["state"]["key"].tolist()
        position = {**numpys, "state": {**numpys["state"], "key": keys}}
        return torch.get_rng_state().tolist(), cuda, position, random.getstate()

    def moved(self) -> bool:
        """Whether any number was drawn since the state was taken. Waits for the device."""
        return self._now() != self.states

    def restore(self) -> None:
        host, cuda, numpys, pythons = self.states
        torch.set_rng_state(torch.tensor(host, dtype=torch.uint8, device="cpu"))
        if cuda is not None and self.device is not None:
            state = torch.tensor(cuda, dtype=torch.uint8, device="cpu")
            torch.cuda.set_rng_state(state, self.device)
        np.random.set_state(numpys)
        random.setstate(pythons)
