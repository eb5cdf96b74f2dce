"""The habit of NVIDIA Apex's users: its fused cross-entropy, torch's kl_div for the pairs, one
backward pass. CUDA only; raises ImportError where Apex, built with xentropy, is missing (PyPI's
`apex` is something else).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from apex.contrib.xentropy import SoftmaxCrossEntropyLoss
from torch import Tensor

NO_PADDING = -100  # its default, 0, would ignore the rows of class 0


def losses(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    log_p = [F.log_softmax(z, dim=1) for z in logits]
    p = [x.detach().exp() for x in log_p]
    result = []
    for k, z in enumerate(logits):
        others = [p[teacher] for teacher in range(len(logits)) if teacher != k]
        kl = sum(F.kl_div(log_p[k], teacher, reduction="batchmean") for teacher in others)
        half = z.dtype != torch.float32  # float32 logits are refused with half_to_float
        ce = SoftmaxCrossEntropyLoss.apply(z, labels, 0.0, NO_PADDING, half)
        result.append(ce.mean() + kl / max(len(others), 1))
    return result
