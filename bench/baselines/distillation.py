"""Distillation as people write it: the cross-entropy and a divergence from the teacher, a line
each.

The divergences are those of `fastdml.mutual_loss`; the generalised Jensen-Shannon divergence is
written as in Liger's and TRL's distillation losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE, CE_WEIGHT, KL_WEIGHT = 4.0, 0.5, 0.5
BETA = 0.5
OPTIONS = {"temperature": TEMPERATURE, "ce_weight": CE_WEIGHT, "kl_weight": KL_WEIGHT}  # of ours


def divergence_of(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The mean over rows, of softened logits (N, C)."""
    if divergence == "forward":
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)

    def kl(log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    if divergence == "reverse":
        return kl(log_q, log_p)
    if divergence == "jeffreys":
        return (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    shares = torch.stack([log_p + math.log(BETA), log_q + math.log(1 - BETA)])
    log_m = shares.logsumexp(0)
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


def losses(logits: Sequence[Tensor], labels: Tensor, divergence: str) -> list[Tensor]:
    """The loss of the student, the first of two peers."""
    student, teacher = (z.float() for z in logits)
    soft = divergence_of(student / TEMPERATURE, teacher / TEMPERATURE, divergence)
    return [CE_WEIGHT * F.cross_entropy(student, labels) + KL_WEIGHT * TEMPERATURE**2 * soft]


def gradients(losses: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """That of the student."""
    return list(torch.autograd.grad(losses[0], logits[:1]))
