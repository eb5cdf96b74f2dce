"""Plans of launches: what a signature's launches have in common is found out at the first of them.

A signature is all that decides which kernel runs and with which constants: options, dtypes,
strides, the alignment of pointers, which arguments are there. Sizes of the batch, pointers and
scalars are not of it: a launch fills them in and goes straight to the compiled kernel's launcher.
Where a plan cannot promise the same launch (Triton's interpreter, profilers' hooks, other backends)
`kernel[grid](...)` is called. A plan holds no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import reduce
from operator import or_
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .row_alignment import misaligned
from .torch_private import current_stream
from .triton_private import Direct, compiled_for, direct_launch, launches_alone

MOST = 1024  # signatures kept, of one kind of launch
INT32 = range(-(2**31), 2**31)
UNKNOWN: Any = object()  # no plan as yet
P = TypeVar("P")


class Plans(Generic[P]):
    """The latest `MOST` plans by signature; made by any thread."""

    def __init__(self) -> None:
        self.known: dict[Hashable, P] = {}
        self.get, self.lock = self.known.get, Lock()

    def add(self, signature: Hashable, plan: P) -> None:
        with self.lock:
            if len(self.known) >= MOST:  # the oldest goes
                del self.known[next(iter(self.known))]
            self.known[signature] = plan


def beyond_int32(*numbers: int) -> Hashable:
    """Which of the numbers, none below 0, Triton passes as more than int32."""
    return reduce(or_, numbers) >> 31 and tuple([n >> 31 != 0 for n in numbers])


def not_current(device: torch.device) -> bool:
    """Whether a launch on a device must make it the current one first."""
    return device.type == "cuda" and torch.cuda.current_device() != device.index


class Planned:
    """A kernel whose run-time arguments come first, launched by plans."""

    def __init__(self, kernel: Any, *names: str) -> None:
        self.kernel, self.names = kernel, names  # names: of the run-time arguments
        self.plans: Plans[Direct | None] = Plans()

    def __call__(
        self,
        grid: tuple[int, int, int],
        values: tuple[Any, ...],  # the run-time arguments; a tuple holds matrices (N, C)
        signature: Hashable,  # what the constants depend on
        constants: Callable[[], dict[str, Any]],
        **options: Any,  # the compiler's, the same at each call
    ) -> None:
        bound, kinds, device = _bound(values)
        if not_current(device):
            with torch.cuda.device(device.index):
                return self(grid, values, signature, constants, **options)
        key = (device, signature, kinds, launches_alone())
        direct = self.plans.get(key, UNKNOWN)
        if direct is UNKNOWN:
            named = self._named(values) | constants()
            compiled = compiled_for(self.kernel, named, options)
            direct = direct_launch(self.kernel, compiled, self.names, named)
            self.plans.add(key, direct)
        if direct is not None:
            return direct(grid, current_stream(device.index), bound)
        self.kernel[grid](**self._named(values), **constants(), **options)
        return None

    def _named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=True))


def _bound(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], Hashable, Any]:
    """Values as a launcher takes them, what Triton compiles another kernel for, and the device."""
    bound: list[Any] = []
    kinds: list[Any] = []
    device = None
    for value in values:
        if isinstance(value, Tensor):
            device = value.device
            address = value.data_ptr()
            bound.append(address)
            kinds.append((value.dtype, address & 15 == 0))
        elif type(value) is tuple:
            addresses, kind, of = _of_matrices(value)
            device = device or of
            bound.append(addresses)
            kinds.append(kind)
        else:
            bound.append(value)
            if type(value) is int:
                kinds.append(value in INT32 or value.bit_length())
            elif type(value) is float or value is None:
                kinds.append(type(value))
            else:  # a plan for this value alone
                kinds.append((type(value), value))
    return tuple(bound), tuple(kinds), device


def _of_matrices(matrices: tuple[Tensor, ...]) -> tuple[tuple[int, ...], Hashable, Any]:
    rows = [(t.dtype, t.stride()) for t in matrices]
    addresses = tuple([t.data_ptr() for t in matrices])
    return addresses, (*rows, misaligned(addresses, rows)), matrices[0].device
