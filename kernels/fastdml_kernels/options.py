"""The options of the mutual-learning loss, checked once and hashable.

An `Options` holds the values that a kernel is specialised on; the tensors (logits, labels, weights)
are separate arguments. Numbers that a schedule may change (ce_weight, kl_weight, temperature) are
not in it, but floats or 0-d tensors, so that changing them never compiles or captures anything
anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

Target = Literal["peers", "ensemble", "ensemble_logits"]
Gate = Literal["none", "correct", "best", "confidence", "entropy"]
Divergence = Literal["forward", "reverse", "jeffreys", "jsd"]
Reduction = Literal["mean", "sum", "none"]
CHOICES = {
    "target": get_args(Target), "gate": get_args(Gate), "divergence": get_args(Divergence),
    "reduction": get_args(Reduction),
}  # fmt: skip
SOFT_GATES = ("confidence", "entropy")  # weights over the teachers, others choose among them
EVEN = 0.5  # jsd_beta where it is not given, and where the divergence has none

Scalar = float | Tensor  # a number, or a 0-d tensor on the logits' device


@dataclass(frozen=True)
class Options:
    """What the loss computes; the meaning of each is documented at `fastdml.mutual_loss`.

    divergence="jsd" with jsd_beta 0 or 1 becomes "forward" or "reverse", which it then is: code
    that sees "jsd" has 0 < jsd_beta < 1. students: peers in ascending order, checked by `fastdml`.
    """

    target: Target = "peers"
    gate: Gate = "none"
    divergence: Divergence = "forward"
    jsd_beta: float = EVEN
    detach_targets: bool = True
    label_smoothing: float = 0.0
    ignore_index: int = -100
    mimic_ignored: bool = False
    reduction: Reduction = "mean"
    students: tuple[int, ...] | None = None  # None: the peers whose logits require a gradient

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
        for name in ("label_smoothing", "jsd_beta"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name}={getattr(self, name)!r}: give a number, 0 to 1")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing}: give a share of the target, 0 to 1"
            )
        if self.divergence == "jsd":
            if not 0.0 <= self.jsd_beta <= 1.0:
                raise ValueError(
                    f"jsd_beta={self.jsd_beta}: give the teacher's share of the mixture, 0 to 1"
                )
            if self.jsd_beta in (0.0, 1.0):
                limit = "forward" if self.jsd_beta == 0.0 else "reverse"
                object.__setattr__(self, "divergence", limit)
                object.__setattr__(self, "jsd_beta", EVEN)
        elif self.jsd_beta != EVEN:
            raise ValueError(
                f"jsd_beta={self.jsd_beta} with divergence={self.divergence!r}: it belongs to "
                "divergence='jsd'; give that, or leave jsd_beta out"
            )

    def summed(self) -> Options:
        """The same loss with reduction="sum"."""
        return replace(self, reduction="sum")


def default_edge(K: int, gate: str) -> float:
    """The weight of one teacher when no `peer_weights` are given: the teachers' mean (paper,
    section 3.3); with gate="best" a row has a single teacher, which counts in full."""
    return 1.0 if gate == "best" else 1.0 / max(K - 1, 1)
