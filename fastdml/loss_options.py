"""The options of the mutual losses: their types for a type checker, and their defaults.

Functions that take them as `**options: Unpack[LossOptions]` share this one list.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

import torch
from fastdml_kernels import Call, Options
from fastdml_kernels.options import EVEN, Divergence, Gate, Reduction, Scalar, Target
from torch import Tensor

from fastdml.names import advice

Students = Sequence[int] | Sequence[bool] | Tensor  # indices of peers, or a mask over them
Function = TypeVar("Function", bound=Callable[..., Any])


class SharedOptions(TypedDict, total=False):
    """What every mutual loss can be asked for; documented at `mutual_loss`."""

    temperature: Scalar
    ce_weight: Scalar
    kl_weight: Scalar
    target: Target
    peer_weights: Tensor | None
    gate: Gate
    divergence: Divergence
    jsd_beta: float
    symmetric: bool
    students: Students | None
    label_smoothing: float
    class_weight: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    mimic_ignored: bool


class LossOptions(SharedOptions, total=False):
    """The options of `mutual_loss`, but for return_stats, which decides what it returns."""

    detach_targets: bool
    reduction: Reduction


class LinearLossOptions(SharedOptions, total=False):
    """The options of `linear_mutual_loss`, whose teachers are constants."""

    reduction: Literal["mean", "sum"]


def call_with(
    labels: Tensor,
    want_stats: bool,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    target: Target = "peers",
    peer_weights: Tensor | None = None,
    gate: Gate = "none",
    divergence: Divergence = "forward",
    jsd_beta: float = EVEN,
    symmetric: bool = False,
    students: Students | None = None,
    detach_targets: bool = True,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    mimic_ignored: bool = False,
    reduction: Reduction = "mean",
    **unknown: Any,
) -> Call:
    """The `Call` that the kernels get. Raises ValueError for an option that is not one of its
    choices, TypeError for a name that is no option. Of students given as a mask, its length is
    still to be checked (`mask_length`)."""
    if unknown:
        name = next(iter(unknown))
        known = inspect.signature(call_with).parameters.values()
        names = [p.name for p in known if p.kind is p.KEYWORD_ONLY]
        raise TypeError(f"{name} is no option of the loss; {advice(name, names)}")
    # The kernels are compiled for Python's own numbers: numpy's, say, are no constants to Triton.
    if type(label_smoothing) is not float and hasattr(label_smoothing, "__float__"):
        label_smoothing = float(label_smoothing)
    if not isinstance(ignore_index, int) and hasattr(ignore_index, "__index__"):
        ignore_index = operator.index(ignore_index)
    if type(jsd_beta) is not float and hasattr(jsd_beta, "__float__"):
        jsd_beta = float(jsd_beta)
    if symmetric:
        if divergence not in ("forward", "jeffreys"):
            raise ValueError(
                f"symmetric=True with divergence={divergence!r}: it is another name for "
                "divergence='jeffreys'; give one of the two"
            )
        divergence = "jeffreys"
    of_values = _options if ignore_index.__class__ is int else Options  # 2.0 == 2, True == 1
    options = of_values(
        target, gate, divergence, jsd_beta, bool(detach_targets), label_smoothing, ignore_index,
        bool(mimic_ignored), reduction, None if students is None else indices_of(students),
    )  # fmt: skip
    return Call(
        labels, options, temperature, ce_weight, kl_weight, peer_weights, class_weight,
        sample_weight, bool(want_stats),
    )  # fmt: skip


_KNOWN: dict[Any, Options] = {}  # by their values
MOST = 256


def _options(*values: Any) -> Options:
    """`Options(*values)`, checked once: a loop asks for the same ones at every step."""
    if torch.compiler.is_compiling():
        return Options(*values)
    try:
        known = _KNOWN.get(values)
    except TypeError:  # not hashable: no option's value
        return Options(*values)
    if known is None:
        known = Options(*values)
        if len(_KNOWN) >= MOST:
            _KNOWN.clear()
        _KNOWN[values] = known
    return known


def _numbers(students: Students) -> list[Any]:
    """The given students as Python's numbers."""
    if isinstance(students, Tensor):
        if students.device.type != "cpu" or students.dim() != 1:
            raise ValueError(
                f"students as a tensor {tuple(students.shape)} on {students.device}: give indices "
                "or a mask of one dimension on the CPU, or a list"
            )
        students = students.tolist()
    if isinstance(students, (str, bytes)) or not hasattr(students, "__iter__"):
        raise TypeError(f"students={students!r}: give a list of peers' indices, or a mask of bools")
    return list(students)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's too


def mask_length(students: Students | None) -> int | None:
    """The number of peers that a mask speaks of; None for indices, which speak of any number."""
    if students is None:
        return None
    given = _numbers(students)
    return len(given) if given and all(map(_is_flag, given)) else None


def indices_of(students: Students) -> tuple[int, ...]:
    """The peers' indices in ascending order, from such or from a mask. Raises ValueError where one
    is repeated or below 0 and where there is none, TypeError for what is no index."""
    given = _numbers(students)
    flags = sum(map(_is_flag, given))
    if flags == len(given):
        chosen = [k for k, is_student in enumerate(given) if is_student]
    elif flags or not all(hasattr(k, "__index__") for k in given):
        raise TypeError(
            f"students={students!r}: give peers' indices alone, or a mask of bools alone"
        )
    else:
        chosen = sorted(map(operator.index, given))
    if not chosen:
        raise ValueError(
            f"students={students!r}: nobody learns; name at least one peer, or call under "
            "torch.no_grad() for losses alone"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"students={students!r}: a peer is named twice; name each once")
    if chosen[0] < 0:
        raise ValueError(f"students={students!r}: peers are counted from 0; give 0 to K - 1")
    return tuple(chosen)


def shows(options: type) -> Callable[[Function], Function]:
    """Decorates a function that takes `**options` of this type: `help` and `inspect.signature` then
    list each with its type and default."""

    def decorate(function: Function) -> Function:
        shown = inspect.signature(function, eval_str=True)
        own = shown.parameters.values()
        types, known = get_type_hints(options), inspect.signature(call_with).parameters.values()
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                *(p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD),
                *(p.replace(annotation=types[p.name]) for p in known if p.name in types),
                *(p for p in own if p.kind is p.KEYWORD_ONLY),
            ],
            return_annotation=shown.return_annotation,
        )
        return function

    return decorate
