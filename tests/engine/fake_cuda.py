"""A CUDA device that computes nothing: tensors on `cuda:0` with shapes, dtypes and devices alone.

torch's FakeTensorMode makes them, and refuses what mixes devices or asks for a value. What needs a
driver is replaced: streams, events, generators, autograd's engine, the fused optimizers' kernels,
and the recording of a graph. The loss and everything else runs as it is; the loss's kernel is the
operator's own fake implementation.

Within `Device.watched()` an `Offence` is raised by any operation that has tensors of two devices
(also a single number that lies on the host, which a captured graph would keep for ever), by any
copy between devices, and by anything for which the host would wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class Offence(Exception):
    """Not an error that an execution would take for a reason to fall back on another."""


class Watch(TorchDispatchMode):
    """Sees every operation on a tensor."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not self.device.watching:
            return func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device for t in given}
        if len(devices) > 1:
            self.device.offence(f"{func} of tensors on {sorted(map(str, devices))}")
        try:
            result = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self.device.offence(f"{func} waits for the device, in {error}")
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if given and any(t.device not in devices for t in made):
            self.device.offence(f"{func} copies from {devices} to {[t.device for t in made]}")
        self.device.dtypes |= {t.dtype for t in made if t.device == CUDA}
        return result


class Stream:
    device, cuda_stream = CUDA, 7

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Event:
    """A time on the device, of which the host may learn when it is over."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None:
        FAKE[-1].wait("an event")

    def elapsed_time(self, end: Event) -> float:
        FAKE[-1].wait("the time between events")
        return 1.0


class Capture:
    """In place of `CudaCapture`: what it records it calls at once, and never again."""

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA
        self.replays = 0

    def warm_up(self) -> Any:
        return nullcontext()

    def supervised(self) -> Any:
        return FAKE[-1].watched()

    def capture(self, run: Any) -> Tensor:
        with FAKE[-1].watched(), FAKE[-1].capturing():
            return run()

    def replay(self) -> None:
        self.replays += 1


FAKE: list[Device] = []  # the one in use, for what torch and the engine make by themselves


class Device:
    """The device that `fake_cuda` lends to a test."""

    def __init__(self) -> None:
        self.offences: list[str] = []
        self.dtypes: set[torch.dtype] = set()  # of what was computed within `watched`
        self.kernels: list[str] = []  # of fused optimizers
        self.watching = self.in_capture = False

    def offence(self, what: str) -> NoReturn:
        self.offences.append(what)
        raise Offence(what)

    @contextmanager
    def watched(self) -> Iterator[None]:
        was, self.watching = self.watching, True
        try:
            with Watch(self) if not was else nullcontext():
                yield
        finally:
            self.watching = was

    def meant(self, call: Any) -> Any:
        """`call`, which may wait for the device."""

        def unwatched(*arguments: Any, **options: Any) -> Any:
            was, self.watching = self.watching, False
            try:
                return call(*arguments, **options)
            finally:
                self.watching = was

        return unwatched

    @contextmanager
    def capturing(self) -> Iterator[None]:
        self.in_capture = True
        try:
            yield
        finally:
            self.in_capture = False

    def off(self) -> Any:
        """Within it tensors are real, as while peers are made on the host."""
        return unset_fake_temporarily()

    @contextmanager
    def answering(self, value: bool) -> Iterator[None]:
        """While something is made: whoever asks whether a tensor is true is told `value`, and
        whoever wants a list of its numbers gets zeros."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "__bool__", lambda t: value)
            patch.setattr(FakeTensor, "tolist", lambda t: [0.0] * len(t))
            yield

    def wait(self, what: str) -> None:
        if self.watching:
            self.offence(f"{what} waits for the device")

    def images(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=CUDA)

    def labels(self, N: int) -> Tensor:
        return torch.empty(N, dtype=torch.int64, device=CUDA)


def moved(module: nn.Module) -> nn.Module:
    """`module.to("cuda:0", memory_format=torch.channels_last)` of real tensors, in place."""
    for m in module.modules():
        for table in (m._parameters, m._buffers):
            for name, t in table.items():
                if t is not None:
                    like = torch.empty(t.shape, dtype=t.dtype, device=CUDA)
                    if t.dim() == 4:
                        like = like.contiguous(memory_format=torch.channels_last)
                    weight = isinstance(t, nn.Parameter)
                    table[name] = nn.Parameter(like, t.requires_grad) if weight else like
    return module


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The weights that autograd's graph of these tensors ends in."""
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    found = {id(t): t for t in tensors if t.grad_fn is None and t.requires_grad}
    seen = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions if following is not None]
    return list(found.values())


def _fit(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for t, g in zip(tensors, grads, strict=True):
        assert (t.shape, t.dtype, t.device) == (g.shape, g.dtype, g.device), (t, g)


def backward(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Every weight that the tensors depend on gets a gradient, as autograd's engine adds it."""
    _fit(tensors, grads)
    for w in _leaves(tensors):
        if w.grad is None:
            w.grad = torch.empty_like(w)
        else:
            w.grad.add_(torch.empty_like(w))


def grad(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    assert output.dim() == 0
    known = {id(t) for t in _leaves([output])}
    assert all(id(t) in known for t in inputs)
    return tuple(map(torch.empty_like, inputs))


def _fused(name: str) -> Any:
    def kernel(weights: list[Tensor], *rest: Any, **options: Any) -> None:
        tensors = [t for t in tree_leaves((weights, rest, options)) if isinstance(t, Tensor)]
        found = {t.device for t in tensors}
        if found != {CUDA}:
            FAKE[-1].offence(f"{name} of tensors on {found}")
        for others in rest[:3]:
            if isinstance(others, (list, tuple)) and others:
                assert [t.shape for t in others] == [t.shape for t in weights]
        FAKE[-1].kernels.append(name)

    return kernel


def _state(*_: Any) -> Tensor:
    """Of the generator; inside a capture torch refuses to tell."""
    if FAKE[-1].in_capture:
        FAKE[-1].offence("the generator's state is asked for inside a capture")
    return torch.empty(16, dtype=torch.uint8)


def _address(t: Tensor) -> int:
    """A place apart for each piece of memory."""
    return (t.untyped_storage()._cdata << 24) + t.storage_offset() * t.element_size()


@contextmanager
def device() -> Iterator[Device]:
    """A `Device`; with it on, tensors of `cuda:0` can be made, and hold nothing."""
    from fastdml.engine.graph import GraphStep

    found = Device()
    cuda = {
        "Stream": Stream, "Event": Event, "get_device_name": lambda device: "a fake",
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: nullcontext(), "is_current_stream_capturing":
        lambda: found.in_capture, "get_rng_state": _state, "set_rng_state": lambda *_: None,
        "synchronize": lambda device=None: found.wait("torch.cuda.synchronize"),
        "get_device_capability": lambda device=None: (9, 0), "is_bf16_supported": lambda *_: True,
    }  # fmt: skip
    FAKE.append(found)
    try:
        with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=False):
            for name, value in cuda.items():
                patch.setattr(torch.cuda, name, value)
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.autograd, "backward", backward)
            patch.setattr(torch.autograd, "grad", grad)
            for name in ("sgd", "adam", "adamw"):
                patch.setattr(torch, f"_fused_{name}_", _fused(name))
            patch.setattr(FakeTensor, "data_ptr", _address)
            # Peers are compared with a stack of them by values, which there are none of here.
            patch.setattr("fastdml.engine.stacked.prove", lambda *_: None)
            patch.setattr("fastdml.engine.stackable._strange_tensor", lambda t: None)
            patch.setattr(GraphStep.__init__, "__defaults__", (Capture,))
            yield found
    finally:
        FAKE.remove(found)
