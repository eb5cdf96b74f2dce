"""Every use of torch's private API: why, and the public API that would do instead, if there is one.

Names that begin with an underscore may change with any release of torch. They are used here and
nowhere else in `fastdml_kernels`, each in a function that says why, and tried on the oldest and the
newest torch by a test of its own. ("Public: none" is as of torch 2.14.)
"""

from __future__ import annotations

from collections.abc import Sequence

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


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode (FakeTensorMode, make_fx, counters of FLOPs) wants to see each
    operation. Public: none."""
    return torch._C._len_torch_dispatch_stack() > 0
