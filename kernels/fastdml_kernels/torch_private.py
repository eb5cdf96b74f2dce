"""Every use of what torch keeps to itself, with the reason and what replaces it.

Names that begin with an underscore may change with any release of torch. They are used here and
nowhere else in `fastdml_kernels`, each in a function that says why, and tried on the oldest and the
newest torch by a test of its own. ("Public: none" is as of torch 2.14.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Exactly these types: a subclass may keep its values elsewhere than in its own memory.
PLAIN = (Tensor, torch.nn.Parameter)


def function_transforms_active(tensors: Sequence[Tensor]) -> bool:
    """Whether torch.func (grad, vmap, ...) is at work, or a tensor is a batch of autograd's
    is_grads_batched: either would see wrong derivatives of what Triton computes. Public: none."""
    batched = map(torch._C._functorch.is_legacy_batchedtensor, tensors)
    return torch._C._are_functorch_transforms_active() or any(batched)


def has_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor has a tangent of forward-mode differentiation. `unpack_dual` is public, and
    an error where no level is entered, which only its module knows. Public: none."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def is_plain(t: Tensor) -> bool:
    """Whether a tensor's memory holds its values, as a kernel reads them: not one that stands for
    its negative, for zeros without memory, or for a functional version. Public: `is_neg` alone."""
    return type(t) in PLAIN and not (
        t.is_neg() or t._is_zerotensor() or torch._is_functional_tensor(t)
    )


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode (FakeTensorMode, make_fx, counters of FLOPs) wants to see each
    operation. Public: none."""
    return torch._C._len_torch_dispatch_stack() > 0
