"""Every use of torch's private API: why, and the public API that would do instead, if there is one.

Names that begin with an underscore may change with any release of torch. They are used here and
nowhere else in `fastdml_kernels`, each in a function that says why, and tried on the oldest and the
newest torch by a test of its own. ("Public: none" is as of torch 2.14.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Exactly these types: a subclass may hold no values in its own memory.
PLAIN = (Tensor, torch.nn.Parameter)


def function_transforms_active(tensors: Sequence[Tensor]) -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) or a backward pass with is_grads_batched
    is active: neither can follow a Triton kernel, and derivatives would be wrong. Public: none."""
    batched = map(torch._C._functorch.is_legacy_batchedtensor, tensors)
    return torch._C._are_functorch_transforms_active() or any(batched)


def has_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor has a tangent of forward-mode differentiation. The public `unpack_dual` is
    an error outside of a dual level, and no public function tells whether there is one. Public:
    none."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def is_plain(t: Tensor) -> bool:
    """Whether a tensor's memory holds its values, as a kernel reads them: not a negated view, zeros
    without memory, or a functional tensor. Public: `is_neg` alone."""
    return type(t) in PLAIN and not (
        t.is_neg() or t._is_zerotensor() or torch._is_functional_tensor(t)
    )


_keys_of = torch._C._dispatch_keys
_ORDINARY: set[int] = set()  # keys of dispatch of tensors looked at before


def ordinary(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors are plain, dense, autograd's, and in no transform. A tensor's keys of
    dispatch say all of that at once, where the questions asked singly take longer than the launch
    of a kernel. Public: none."""
    for t in tensors:
        if type(t) not in PLAIN:
            return False
        keys = _keys_of(t).raw_repr()
        if keys not in _ORDINARY:
            if (
                t.is_nested
                or t.layout != torch.strided
                or t.is_inference()
                or not is_plain(t)
                or torch._C._functorch.is_functorch_wrapped_tensor(t)
                or torch._C._functorch.is_legacy_batchedtensor(t)
            ):
                return False
            _ORDINARY.add(keys)
    return True


_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_traced = torch._C._is_tracing


def watched() -> bool:
    """Whether anything looks at operations or changes what a derivative is, whatever tensors it is
    for: a TorchDispatchMode, torch.jit.trace, a transform of torch.func or forward-mode
    differentiation. One question, as every call of the loss asks it. Public:
    `torch.jit.is_tracing` for the second."""
    return _modes() > 0 or _traced() or forward_ad._current_level >= 0 or _transforms()


def ordinary_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A function's `apply` for tensors that are `ordinary` while nothing is `watched`. The public
    one looks for transforms, and among all arguments for tensors of transforms that have ended.
    Public: `function.apply`."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode (FakeTensorMode, make_fx, counters of FLOPs) wants to see each
    operation. Public: none."""
    return torch._C._len_torch_dispatch_stack() > 0


def current_stream(device: int) -> int:
    """The handle of a CUDA device's current stream. Public: `torch.cuda.current_stream(device)`,
    which makes a Stream object to read it from, most of a launch's host time."""
    return torch._C._cuda_getCurrentRawStream(device)
