"""The log-probability of the label and the entropy of each row of logits, at temperature 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # of log-probabilities at a time


def write_row_values(
    logits: Sequence[Tensor],  # K tensors (n, C)
    labels: Tensor,  # (n,)
    ignore_index: int,
    log_prob: Tensor,  # (K, n), written: 0 for a row without a label, NaN for one that is no class
    entropy: Tensor,  # (K, n), written
) -> None:
    """Writes both of every row, in the dtype of `entropy`; log-probabilities exist for a block of
    rows at a time."""
    n, C = logits[0].shape
    step = max(1, BLOCK_BYTES[labels.device.type] // (entropy.element_size() * C))
    known = (labels >= 0) & (labels < C)
    index = labels.long().clamp(0, C - 1)[:, None]
    otherwise = torch.where(labels == ignore_index, 0.0, entropy.new_full((), torch.nan))
    known &= labels != ignore_index
    for k, z in enumerate(logits):
        for start in range(0, n, step):
            rows = slice(start, start + step)
            log_p = torch.log_softmax(z[rows], dim=1, dtype=entropy.dtype)
            of_label = log_p.gather(1, index[rows])[:, 0]
            log_prob[k, rows] = torch.where(known[rows], of_label, otherwise[rows])
            # a class of probability 0 counts 0: with the lowest number in place of log 0
            log_p.clamp_(min=torch.finfo(log_p.dtype).min)
            entropy[k, rows] = -log_p.exp().mul_(log_p).sum(1)
