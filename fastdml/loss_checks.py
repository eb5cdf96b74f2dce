"""Checks of the losses' arguments, before any kernel runs.

They look at types, shapes, dtypes and devices, and at the values of Python's numbers: nothing that
would wait for the device. Raise ValueError and TypeError.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from fastdml_kernels import Call, Options, at_once
from torch import Tensor

FARTHEST = 1e18  # the largest temperature, and one over the smallest
LARGEST = sys.float_info.max
INT64 = -(2**63), 2**63 - 1
NO_TENSORS = (float, bool, Options)  # isinstance is slow on what is no tensor
NUMBERS = frozenset({float, int, type(None)})  # of which a signature needs the type alone
MOST = 1024  # signatures kept
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_call(
    logits: Tensor | Sequence[Tensor], call: Call, peers: int | None = None
) -> tuple[list[Tensor], bool]:
    """The logits as K tensors (N, C) or one (K, N, C), after every check that needs no value on
    the device; and whether the call is the usual one (`fastdml_kernels.at_once`). peers: how many
    the students, given as a mask, speak of."""
    if logits.__class__ is not list and isinstance(logits, Tensor):
        tensors = [logits]
    else:
        tensors = list(logits)
    usual = at_once([*tensors, *call.tensors()])
    signature = _signature(logits, tensors, call, peers) if usual else None
    if signature is not None and signature in _passed:
        return tensors, usual
    refuse_unusual("logits", tensors)
    for name, value in zip(Call._fields, call, strict=True):
        if value is not None and type(value) not in NO_TENSORS:
            refuse_unusual(name, [value])
    K, N, C = _sizes(logits, tensors)
    device = _check_kinds(tensors)
    _check_labels(call.labels, N, device)
    _check_weights(call, K, N, C, device)
    check_students(call.options.students, K, peers)
    _check_numbers(call, device)
    if signature is not None:
        if len(_passed) >= MOST:
            _passed.clear()
        _passed.add(signature)
    return tensors, usual


_passed: set[Hashable] = set()  # the signatures of calls that were in order


def _signature(
    logits: Tensor | Sequence[Tensor], tensors: list[Tensor], call: Call, peers: int | None
) -> Hashable | None:
    """What the checks look at in a usual call: one like another that was in order is in order.
    Values of numbers and the number of rows are looked at here, and are not of it. None where the
    checks have to look. Every call of the loss comes by here: each attribute of a tensor is asked
    for once."""
    if not tensors:
        return None
    labels, options, T, ce, kl, of_peers, of_classes, of_rows, _ = call
    first, ignore = tensors[0], options.ignore_index
    device, shape = first.device, first.shape
    axes = len(shape)
    if axes < 2 or labels.shape != (shape[-2],) or labels.device != device:
        return None
    if ignore.__class__ is not int or not INT64[0] <= ignore <= INT64[1]:
        return None
    kinds: list[Hashable] = [labels.dtype]
    for t in tensors:
        if t.shape != shape or t.device != device:
            return None
        kinds.append(t.dtype)
    if T.__class__ is ce.__class__ is kl.__class__ is float and (
        of_peers is of_classes is of_rows is None
    ):
        if not (1 / FARTHEST <= T <= FARTHEST and 0 <= ce <= FARTHEST and 0 <= kl <= FARTHEST):
            return None
    else:
        others = _signature_of_others(call, device, shape[-2])
        if others is None:
            return None
        kinds.append(others)
    K = shape[0] if axes == 3 else len(tensors)
    return device, first is logits, axes, K, shape[-1], options.students, peers, *kinds


def _signature_of_others(call: Call, device: torch.device, N: int) -> Hashable | None:
    """That of weights and of numbers, which may be 0-d tensors; None where the checks look."""
    given, sample_weight = call[2:7], call.sample_weight  # temperature to class_weight
    tensors: list[Any] = []
    for value in given:
        if value.__class__ not in NUMBERS:
            tensors.append(value)
        elif value is not None and not 0 <= value <= FARTHEST:
            return None
    temperature = call.temperature
    if temperature is None or (temperature.__class__ in NUMBERS and temperature < 1 / FARTHEST):
        return None
    for t in tensors:
        if not isinstance(t, Tensor) or t.device != device:
            return None
    kind: Hashable = None
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor) or sample_weight.device != device:
            return None
        if sample_weight.shape != (N,):
            return None
        kind = sample_weight.dtype, sample_weight.requires_grad
    return kind, tuple(map(type, given)), tuple([(t.shape, t.requires_grad) for t in tensors])


def _sizes(logits: Tensor | Sequence[Tensor], tensors: list[Tensor]) -> tuple[int, int, int]:
    """K, N and C."""
    if isinstance(logits, Tensor):
        if logits.dim() != 3:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}: give (K, N, C), or a list of K (N, C)"
            )
        K, N, C = logits.shape
    else:
        if not tensors or any(not isinstance(z, Tensor) or z.dim() != 2 for z in tensors):
            shapes = [
                tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in tensors
            ]
            raise ValueError(
                f"logits {shapes}: give at least one tensor, each of shape (N, C); flatten(0, -2) "
                "makes rows of more dimensions, torch.from_numpy a tensor of an array"
            )
        K, (N, C) = len(tensors), tensors[0].shape
        if any(z.shape != tensors[0].shape for z in tensors):
            shapes = [tuple(z.shape) for z in tensors]
            raise ValueError(f"logits of shapes {shapes}: peers need the same rows and classes")
    if K < 1 or C < 1:
        raise ValueError(f"logits with K = {K} peers and C = {C} classes: at least one of each")
    return K, N, C


def _check_kinds(tensors: list[Tensor]) -> torch.device:
    """The device of all logits, whose dtypes and devices the kernels have."""
    device = tensors[0].device
    for other in tensors:
        if other.dtype not in LOGIT_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES)
            raise TypeError(f"logits of {other.dtype}: cast them to one of {names}")
        if other.dtype == torch.float64 and other.device.type != "cpu":
            raise TypeError("float64 logits are for the CPU: the kernels compute in float32")
        if other.device != device:
            raise ValueError(f"peers on {device} and {other.device}: bring the logits together")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits on {device}: fastdml computes on CPU and CUDA devices")
    return device


def _check_labels(labels: Tensor, N: int, device: torch.device) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels of type {type(labels).__name__}: give a tensor ({N},) of int64 or int32"
        )
    if labels.shape != (N,):
        raise ValueError(f"labels of shape {tuple(labels.shape)} for N = {N} rows: give ({N},)")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels of {labels.dtype}: give class indices, int64 or int32")
    if labels.device != device:
        raise ValueError(f"labels on {labels.device}, logits on {device}: move the labels")


def check_students(students: tuple[int, ...] | None, K: int, peers: int | None) -> None:
    """Raises ValueError for students that K peers do not have, and for a mask of another number of
    `peers` (None: they were given as indices)."""
    if peers is not None and peers != K:
        raise ValueError(f"students as a mask of {peers} for K = {K} peers: give one bool a peer")
    if students is not None and students[-1] >= K:
        raise ValueError(
            f"students hold {students[-1]} with K = {K} peers: they count from 0, give 0 to {K - 1}"
        )


def _check_weights(call: Call, K: int, N: int, C: int, device: torch.device) -> None:
    """peer_weights, class_weight and sample_weight."""
    for name, tensor, shape in (
        ("peer_weights", call.peer_weights, (K, K)),
        ("class_weight", call.class_weight, (C,)),
        ("sample_weight", call.sample_weight, (N,)),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} of type {type(tensor).__name__}: give a tensor {shape}")
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: "
                f"give {shape} on {device}"
            )
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, which the loss does not compute")
        if name == "sample_weight" and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} of {tensor.dtype}: cast it to a floating dtype, say float32")


def _check_numbers(call: Call, device: torch.device) -> None:
    """temperature, ce_weight, kl_weight and ignore_index."""
    numbers = {}
    for name in ("temperature", "ce_weight", "kl_weight"):
        value = getattr(call, name)
        if type(value) is float or not isinstance(value, Tensor):
            if not isinstance(value, (float, int)) and not hasattr(value, "__float__"):
                raise TypeError(f"{name}={value!r}: give a number, or a 0-d tensor on {device}")
            numbers[name] = value if isinstance(value, int) else float(value)
            continue
        if value.dim() != 0 or value.device != device:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} on {value.device}: give a number, or a 0-d "
                f"tensor on {device}"
            )
        if value.requires_grad:
            raise ValueError(f"{name} requires a gradient, which the loss does not compute")
    for name, value in numbers.items():
        if name == "temperature" and not 1 / FARTHEST <= value <= FARTHEST:
            raise ValueError(
                f"temperature={value}: it divides the logits and must be above 0, and finite "
                f"({1 / FARTHEST:g} to {FARTHEST:g}: its square is a float32)"
            )
        if not 0 <= value <= LARGEST:
            raise ValueError(
                f"{name}={value}: below 0 the loss would be without a lower bound; give 0 or more, "
                "and a finite number"
            )
    ignore = call.options.ignore_index
    if not isinstance(ignore, int) and not hasattr(ignore, "__index__"):
        raise TypeError(f"ignore_index={ignore!r}: give a whole number")
    if not INT64[0] <= ignore <= INT64[1]:
        raise ValueError(f"ignore_index={ignore}: give a number that an int64 label can have")


def refuse_unusual(name: str, tensors: Sequence[object]) -> None:
    """Refuses tensors that are sharded, nested or sparse."""
    distributed = sys.modules.get("torch.distributed.tensor")  # no tensor of it without
    for t in tensors:
        if distributed is not None and isinstance(t, distributed.DTensor):
            raise TypeError(
                f"{name}: a DTensor, of which this process may hold a part: give its .to_local(), "
                "or its .full_tensor() where rows or classes are split over processes"
            )
        if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_nested):
            kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            raise TypeError(f"{name}: a {kind} tensor: give a dense one")
