"""The paper's loss on the CPU, every row labelled and weighted alike, in as few torch calls as it
takes: at CIFAR's sizes a call costs more than its arithmetic.

O(K C) a sample, O(K**2 C) with statistics. Each block of rows, small enough to stay in cache with
its copies, goes through: log softmax, values from BLAS dot products over the whole block, gradients
from differences of probabilities, which come before any sum: peers agree late in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import stats_size

BLOCK_BYTES = 1 << 19  # of float32 logits a block; it and its copies share one core's cache


def log_softmax(z: Sequence[Tensor], scale: float, out: Tensor) -> None:
    """log softmax(scale z_k) of K tensors (n, C) into `out` (K, n, C)."""
    for z_k, out_k in zip(z, out.unbind(), strict=True):
        if z_k.dtype != out.dtype or scale != 1.0:
            z_k = z_k.to(out.dtype) * scale
        torch.log_softmax(z_k, dim=1, out=out_k)


def plain_loss(
    logits: Sequence[Tensor],  # K tensors (N, C), N > 0
    y: Tensor,  # (N,) int64
    dtype: torch.dtype,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    averaged: bool,
    grads: Tensor | Sequence[Tensor],  # (K, N, C) or K tensors (N, C) to be written, or ()
    want_stats: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Losses (K,) and packed statistics; None where a logit is not finite, for the careful way."""
    K, (N, C) = len(logits), logits[0].shape
    step = min(max(1, BLOCK_BYTES // (4 * K * C)), N)
    kl_scale = temperature * temperature
    per_row = 1 / N if averaged else 1.0
    ce_factor, kl_factor = ce_weight * per_row, kl_weight * temperature * per_row
    tempered = temperature != 1.0 and K > 1
    need_grad = len(grads) > 0
    memory = torch.empty(4 if tempered else 2, K * step * C, dtype=dtype)
    buffers = memory.view(-1, K, step, C).unbind()
    ce = kl = entropy = correct = ensemble_correct = pairwise = None
    for start in range(0, N, step):
        n = min(step, N - start)
        if n < step:  # the last block
            buffers = memory[:, : K * n * C].view(-1, K, n, C).unbind()
        log_p, p, *tempered_buffers = buffers
        z, label, out = logits, y, grads
        if n < N:
            z = [z_k[start : start + n] for z_k in logits]
            label = y[start : start + n]
            if isinstance(grads, Tensor):
                out = grads[:, start : start + n]
            else:
                out = [grad[start : start + n] for grad in grads]
        log_softmax(z, 1.0, log_p)
        torch.exp(log_p, out=p)
        index = label.expand(K, n).unsqueeze(2)  # (K, n, 1)
        ce = _add(ce, log_p.gather(2, index).sum((1, 2)))
        if want_stats:
            entropy = _add(entropy, torch.special.entr(p).sum((1, 2)))
            correct = _add(correct, (log_p.argmax(2) == label).sum(1))
            ensemble_correct = _add(ensemble_correct, (p.sum(0).argmax(1) == label).sum())
        if K > 1:
            log_q, q = log_p, p
            if tempered:
                log_q, q = tempered_buffers
                log_softmax(z, 1 / temperature, log_q)
                torch.exp(log_q, out=q)
            block_kl, pairs = _kl(log_q, q, want_stats)
            kl, pairwise = _add(kl, block_kl), _add(pairwise, pairs) if want_stats else None
        if need_grad:
            away = _away(q, log_q) if K > 1 else None
            p.mul_(ce_factor).scatter_(2, index, -ce_factor, reduce="add")
            _write(out, p, away, kl_factor)
    losses = ce * (-ce_weight * per_row)
    if K > 1:
        losses.add_(kl, alpha=kl_weight * kl_scale * per_row)
    if not math.isfinite(sum(losses.tolist())):
        return None
    if not want_stats:
        return losses, None
    none = torch.zeros(1, dtype=dtype)  # of K = 1: no other peer to diverge from
    rows = torch.full((2,), N, dtype=dtype)
    together = ensemble_correct.to(dtype)[None]
    packed = torch.cat((
        ce * (-1 / N), none if K == 1 else kl * (kl_scale / N), rows, entropy / N,
        correct.to(dtype), together, none if K == 1 else pairwise.flatten() * (kl_scale / N),
    ))  # fmt: skip
    return losses, F.pad(packed, (0, stats_size(K) - len(packed)))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _kl(log_q: Tensor, q: Tensor, want_pairs: bool) -> tuple[Tensor, Tensor | None]:
    """sum_l KL(q_l || q_k) / (K - 1) summed over the rows, (K,), and of each pair, (K, K);
    overwrites log_q (K, n, C).

    With gaps d_l = log q_l - max_l log q_l, exactly 0 for identical peers,
    sum_l q_l (log q_l - log q_k) = sum_l q_l d_l - d_k sum_l q_l.
    """
    K = len(q)
    if K == 2:
        gap = torch.sub(log_q[0], log_q[1], out=log_q[0]).view(-1)
        first, second = q.view(2, -1).unbind()
        kl = torch.stack((torch.dot(second, gap).neg_(), torch.dot(first, gap)))
        return kl, kl.diag().flip(0) if want_pairs else None
    gaps = log_q.sub_(log_q.amax(0)).view(K, -1)
    energy = torch.dot(q.view(-1), gaps.view(-1))
    kl = torch.mv(gaps, q.sum(0).view(-1)).sub_(energy).mul_(-1 / (K - 1))
    if not want_pairs:
        return kl, None
    cross = torch.stack([torch.mv(gaps, teacher) for teacher in q.view(K, -1).unbind()])
    return kl, cross.diagonal()[:, None] - cross


def _away(q: Tensor, out: Tensor) -> Tensor:
    """What `_write` makes q_k - mean of the others of; overwrites `out` (K, n, C). For K = 2 the
    difference q_1 - q_2 (n, C), else q_k - q_1 (K, n, C)."""
    if len(q) == 2:
        return torch.sub(q[0], q[1], out=out[0])
    return torch.sub(q, q[0], out=out)


def _write(out: Tensor | Sequence[Tensor], p: Tensor, away: Tensor | None, factor: float) -> None:
    """out_k = p_k + factor (q_k - mean of the others); overwrites p (K, n, C)."""
    K = len(p)
    if away is None:
        out[0].copy_(p[0])
        return
    alphas = [factor, -factor]
    if K > 2:
        p.add_(away, alpha=factor * K / (K - 1))
        away = away.sum(0)
        alphas = [-factor / (K - 1)] * K
        if isinstance(out, Tensor) and out.dtype == p.dtype:
            torch.add(p, away, alpha=alphas[0], out=out)
            return
    for p_k, alpha, grad in zip(p.unbind(), alphas, out, strict=True):
        if grad.dtype == p.dtype:
            torch.add(p_k, away, alpha=alpha, out=grad)
        else:
            grad.copy_(p_k.add_(away, alpha=alpha))
