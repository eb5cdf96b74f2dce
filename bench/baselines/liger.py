"""The habit of Liger-Kernel's users: its Triton losses composed, K cross-entropies and K (K - 1)
KL divergences, one backward pass. CUDA only; raises ImportError where liger_kernel is missing.

Its cross-entropy writes the gradient over its input without telling autograd, and these logits are
used again, so it is given a copy. Its backward asks the host whether grad_output is 1, so it
cannot be captured in a CUDA graph and has no kernel time.
"""

from __future__ import annotations

from collections.abc import Sequence

from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD, LigerKLDIVLoss
from torch import Tensor

from bench.baselines.distillation import BETA, CE_WEIGHT, KL_WEIGHT, TEMPERATURE

_cross_entropy = LigerCrossEntropyLoss()
_kl_div = LigerKLDIVLoss(reduction="batchmean", log_target=True)
DIVERGENCES = ("forward", "reverse", "jsd")
_jsd = {"reverse": LigerJSD(beta=1.0), "jsd": LigerJSD(beta=BETA)}


def losses(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    log_p = [z.log_softmax(dim=1) for z in logits]
    fixed = [x.detach() for x in log_p]
    result = []
    for k, z in enumerate(logits):
        others = [fixed[teacher] for teacher in range(len(logits)) if teacher != k]
        kl = sum(_kl_div(log_p[k], teacher) for teacher in others)
        result.append(_cross_entropy(z.clone(), labels) + kl / max(len(others), 1))
    return result


def distillation(logits: Sequence[Tensor], labels: Tensor, divergence: str) -> list[Tensor]:
    """The student's loss, by one of `DIVERGENCES`."""
    student, teacher = ((z / TEMPERATURE).log_softmax(dim=1) for z in logits)
    if divergence == "forward":
        soft = _kl_div(student, teacher)
    else:
        soft = _jsd[divergence](student, teacher)
    hard = _cross_entropy(logits[0].clone(), labels)
    return [CE_WEIGHT * hard + KL_WEIGHT * TEMPERATURE**2 * soft]
