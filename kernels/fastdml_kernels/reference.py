"""The mutual-learning loss written from its definitions, in float64, one student and one teacher
at a time. Slow on purpose: it is what every kernel is tested against, and shares nothing with them.

Gradients come from autograd, never from a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .options import Options


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, (N, C), (N, C) -> (N,); a class with p = 0 contributes 0."""
    p = log_p.exp()
    gap = torch.where(p > 0, log_p - log_q, torch.zeros_like(p))
    return (p * gap).sum(dim=1)


def mutual_loss_reference(
    logits: Sequence[Tensor],  # K tensors (N, C)
    labels: Tensor,  # (N,)
    options: Options = Options(),  # noqa: B008
    *,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    peer_weights: Tensor | None = None,  # (K, K): row k, the weight of each teacher of peer k
    class_weight: Tensor | None = None,  # (C,)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, (K,) or (K, N) with reduction="none", and the statistics by name, all float64.

    L_k = ce_weight CE_k + kl_weight T**2 sum_l w_kl KL(p_l || p_k)  (Zhang et al. 2018, section
    3.3, with temperature as in Hinton et al. 2015).
    """
    z = [logit.to(torch.float64) for logit in logits]
    K, (N, C) = len(z), z[0].shape
    labelled = labels != options.ignore_index
    mimics = torch.ones_like(labelled) if options.mimic_ignored else labelled
    y = torch.where(labelled, labels, 0).long()
    log_p = [torch.log_softmax(z_k, dim=1) for z_k in z]
    log_q = [torch.log_softmax(z_k / temperature, dim=1) for z_k in z]

    weight = z[0].new_ones(C) if class_weight is None else class_weight.double()
    nll = [-log_p[k].gather(1, y[:, None])[:, 0] for k in range(K)]
    right = [(log_p[k].argmax(dim=1) == y) & labelled for k in range(K)]
    eps = options.label_smoothing
    ce_rows = (1 - eps) * weight[y] * torch.stack(nll)
    if eps:  # without smoothing the product may be 0 * (-inf), a NaN
        ce_rows = ce_rows - eps / C * (weight * torch.stack(log_p)).sum(dim=2)
    ce_rows = torch.where(labelled, ce_rows, 0.0)

    edges = z[0].new_full((K, K), 1.0 if options.gate == "best" else 1.0 / max(K - 1, 1))
    if peer_weights is not None:
        edges = peer_weights.double()
    first_best = torch.stack(nll).detach().argmin(dim=0)  # (N,)

    def edge(k: int, teacher: int) -> Tensor:
        """How much peer k learns from `teacher` on each row, (N,)."""
        row = edges[k, teacher].expand(N)
        if options.gate == "correct":
            row = row * right[teacher]
        elif options.gate == "best":
            row = row * ((first_best == teacher) & labelled)
        return row

    def fixed(value: Tensor) -> Tensor:
        return value.detach() if options.detach_targets else value

    def divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
        forward = _kl(log_teacher, log_student)
        return (forward + _kl(log_student, log_teacher)) / 2 if options.symmetric else forward

    kl_rows = []
    for k in range(K):
        teachers = [teacher for teacher in range(K) if teacher != k]
        total = z[0].new_zeros(N)
        if options.target == "peers":
            for teacher in teachers:
                w = edge(k, teacher)
                value = divergence(fixed(log_q[teacher]), log_q[k])
                total = total + torch.where(w != 0, w * value, 0.0)
        elif teachers:
            w = torch.stack([edge(k, teacher) for teacher in teachers])  # (K-1, N)
            any_teacher = w.sum(dim=0) != 0
            w_mix = torch.where(any_teacher, w, 1.0)  # rows without a teacher are masked later
            share = (w_mix / w_mix.sum(dim=0))[..., None]
            if options.target == "ensemble":
                stacked = torch.stack([fixed(log_q[teacher]) for teacher in teachers])
                mixed = torch.logsumexp(stacked + share.log(), dim=0)
            else:
                stacked = torch.stack([fixed(z[teacher]) for teacher in teachers])
                blend = torch.where(share != 0, share * stacked, 0.0).sum(dim=0)
                mixed = torch.log_softmax(blend / temperature, dim=1)
            mixed = torch.where(any_teacher[:, None], mixed, log_q[k].detach())
            total = torch.where(any_teacher, w.sum(dim=0) * divergence(mixed, log_q[k]), 0.0)
        kl_rows.append(torch.where(mimics, total * temperature**2, 0.0))
    kl_all = torch.stack(kl_rows)

    ce_count = (weight[y] * labelled).sum()
    kl_count = mimics.sum().double()
    ce = torch.where(ce_count == 0, torch.nan, ce_rows.sum(dim=1) / ce_count)
    kl = kl_all.sum(dim=1) / kl_count
    if options.mimic_ignored and not labelled.any():
        ce = ce_rows.sum(dim=1)  # a batch without any label teaches by the KL term alone

    def weighted(weight: float, term: Tensor) -> Tensor:
        """weight * term; 0 where the weight is 0, even if the term is infinite or NaN."""
        return torch.where(torch.full_like(term, weight) != 0, weight * term, 0.0)

    if options.reduction == "mean":
        loss = weighted(ce_weight, ce) + (weighted(kl_weight, kl) if K > 1 else 0.0)
    else:
        loss = weighted(ce_weight, ce_rows) + weighted(kl_weight, kl_all)
        loss = loss.sum(dim=1) if options.reduction == "sum" else loss

    def mean(rows: Tensor) -> Tensor:
        return torch.where(mimics, rows, 0.0).sum(dim=-1) / kl_count

    pairwise = torch.stack(
        [torch.stack([mean(_kl(log_q[a], log_q[b])) for b in range(K)]) for a in range(K)]
    )
    entropy = torch.stack([mean(-torch.where(x.exp() > 0, x.exp() * x, 0.0).sum(1)) for x in log_p])
    ensemble = torch.stack(log_p).exp().sum(dim=0).argmax(dim=1)
    stats = {
        "ce": ce,
        "kl": kl,
        "pairwise_kl": pairwise * temperature**2,
        "entropy": entropy,
        "correct": torch.stack(right).sum(dim=1).double(),
        "ensemble_correct": ((ensemble == y) & labelled).sum().double(),
    }
    return loss, {name: value.detach() for name, value in stats.items()}
