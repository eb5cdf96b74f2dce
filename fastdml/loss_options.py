"""The options of the mutual losses: their types for a type checker, and their defaults.

Functions that take them as `**options: Unpack[LossOptions]` share this one list.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

from fastdml_kernels import Call, Options
from fastdml_kernels.options import Gate, Reduction, Scalar, Target
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class SharedOptions(TypedDict, total=False):
    """What every mutual loss can be asked for; documented at `mutual_loss`."""

    temperature: Scalar
    ce_weight: Scalar
    kl_weight: Scalar
    target: Target
    peer_weights: Tensor | None
    gate: Gate
    symmetric: bool
    label_smoothing: float
    class_weight: Tensor | None
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
    symmetric: bool = False,
    detach_targets: bool = True,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    mimic_ignored: bool = False,
    reduction: Reduction = "mean",
) -> Call:
    """The `Call` that the kernels get. Raises ValueError for an option that is not one of its
    choices, TypeError for a name that is no option."""
    # The kernels are compiled for Python's own numbers: numpy's, say, are no constants to Triton.
    if type(label_smoothing) is not float and hasattr(label_smoothing, "__float__"):
        label_smoothing = float(label_smoothing)
    if not isinstance(ignore_index, int) and hasattr(ignore_index, "__index__"):
        ignore_index = operator.index(ignore_index)
    options = Options(
        target, gate, bool(symmetric), bool(detach_targets), label_smoothing, ignore_index,
        bool(mimic_ignored), reduction,
    )  # fmt: skip
    want_stats = bool(want_stats)
    return Call(
        labels, options, temperature, ce_weight, kl_weight, peer_weights, class_weight, want_stats
    )


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
