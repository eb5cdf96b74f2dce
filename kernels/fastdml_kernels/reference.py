"""The mutual-learning loss written from its definitions, in float64, one student and one teacher
at a time. Slow on purpose: it is what every kernel is tested against, and shares nothing with them.

Gradients come from autograd, never from a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .options import Options


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, (N, C), (N, C) -> (N,); a class with p = 0 contributes 0."""
    p = log_p.exp()
    gap = torch.where(p > 0, log_p - log_q, torch.zeros_like(p))
    return (p * gap).sum(dim=1)


def _divergence(log_t: Tensor, log_q: Tensor, options: Options) -> Tensor:
    """From teacher t to student q, (N,)."""
    if options.divergence == "jsd":
        beta = options.jsd_beta
        possible = (log_t > -torch.inf) | (log_q > -torch.inf)  # without: 0 in t, q and m
        parts = torch.stack([log_t + math.log(beta), log_q + math.log1p(-beta)])
        log_m = torch.logsumexp(torch.where(possible, parts, 0.0), dim=0)
        return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_q, log_m)
    forward, reverse = _kl(log_t, log_q), _kl(log_q, log_t)
    return {"forward": forward, "reverse": reverse, "jeffreys": (forward + reverse) / 2}[
        options.divergence
    ]


def _soft_weights(edges: Tensor, log_worth: Tensor) -> Tensor:
    """The weights of a student's teachers on each row, (K - 1, N): their edges (K - 1,) times their
    worth, exp(log_worth) (K - 1, N), scaled so that they add up to what the edges do. NaN is worth
    nothing; rows without any worth have no teacher."""
    known = torch.where(log_worth.isnan() | (edges[:, None] == 0), -torch.inf, log_worth)
    best = known.amax(dim=0)
    worth = edges[:, None] * (known - torch.where(best == -torch.inf, 0.0, best)).exp()
    total = worth.sum(dim=0)
    return torch.where(total > 0, edges.sum() * worth / torch.where(total > 0, total, 1.0), 0.0)


def _learned(
    w: Tensor,  # (K - 1, N), the weight of each teacher on each row
    z: Sequence[Tensor],  # the teachers' logits, (N, C) each
    log_t: Sequence[Tensor],  # and log-probabilities
    log_q: Tensor,  # the student's
    options: Options,
    temperature: float,
) -> Tensor:
    """The divergences from what teaches a student, weighted, (N,). A teacher that does not count on
    a row is not looked at there, be it NaN."""
    if options.target == "peers":
        total = torch.zeros_like(w[0])
        for w_l, log_l in zip(w, log_t, strict=True):
            counting = torch.where((w_l != 0)[:, None], log_l, log_q.detach())
            total = total + torch.where(w_l != 0, w_l * _divergence(counting, log_q, options), 0.0)
        return total
    any_teacher = w.sum(dim=0) != 0
    w_mix = torch.where(any_teacher, w, 1.0)  # rows without a teacher are masked later
    share = (w_mix / w_mix.sum(dim=0))[..., None]
    if options.target == "ensemble":
        stacked = torch.where(share != 0, torch.stack(list(log_t)), 0.0)
        mixed = torch.logsumexp(stacked + share.log(), dim=0)
    else:
        blend = torch.where(share != 0, share * torch.stack(list(z)), 0.0).sum(dim=0)
        mixed = torch.log_softmax(blend / temperature, dim=1)
    mixed = torch.where(any_teacher[:, None], mixed, log_q.detach())
    return torch.where(any_teacher, w.sum(dim=0) * _divergence(mixed, log_q, options), 0.0)


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
    sample_weight: Tensor | None = None,  # (N,)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, (K,) or (K, N) with reduction="none", and the statistics by name, all float64.

    L_k = ce_weight CE_k + kl_weight T**2 sum_l w_kl D(p_l, p_k)  (Zhang et al. 2018, section
    3.3, with temperature as in Hinton et al. 2015), where D is the KL divergence KL(p_l || p_k), or
    another of `Options`. The gradient with respect to peers that are not students is to be ignored.
    """
    if sample_weight is not None and not sample_weight.all():  # a row of weight 0 is absent
        kept = sample_weight.nonzero()[:, 0]
        losses, stats = mutual_loss_reference(
            [z[kept] for z in logits], labels[kept], options, temperature=temperature,
            ce_weight=ce_weight, kl_weight=kl_weight, peer_weights=peer_weights,
            class_weight=class_weight, sample_weight=sample_weight[kept],
        )  # fmt: skip
        if options.reduction == "none":
            losses = losses.new_zeros(len(logits), len(labels)).index_copy(1, kept, losses)
        return losses, stats
    z = [logit.to(torch.float64) for logit in logits]
    K, (N, C) = len(z), z[0].shape
    labelled = labels != options.ignore_index
    mimics = torch.ones_like(labelled) if options.mimic_ignored else labelled
    y = torch.where(labelled, labels, 0).long()
    times = z[0].new_ones(N) if sample_weight is None else sample_weight.double()
    log_p = [torch.log_softmax(z_k, dim=1) for z_k in z]
    log_q = [torch.log_softmax(z_k / temperature, dim=1) for z_k in z]

    weight = z[0].new_ones(C) if class_weight is None else class_weight.double()
    nll = [-log_p[k].gather(1, y[:, None])[:, 0] for k in range(K)]
    right = [(log_p[k].argmax(dim=1) == y) & labelled for k in range(K)]
    entropies = torch.stack([-torch.where(x.exp() > 0, x.exp() * x, 0.0).sum(1) for x in log_p])
    eps = options.label_smoothing
    ce_rows = (1 - eps) * weight[y] * torch.stack(nll)
    if eps:  # without smoothing the product may be 0 * (-inf), a NaN
        ce_rows = ce_rows - eps / C * (weight * torch.stack(log_p)).sum(dim=2)
    ce_rows = torch.where(labelled, ce_rows, 0.0)

    edges = z[0].new_full((K, K), 1.0 if options.gate == "best" else 1.0 / max(K - 1, 1))
    if peer_weights is not None:
        edges = peer_weights.double()
    first_best = torch.stack(nll).detach().argmin(dim=0)  # (N,)

    def weights_of(k: int, teachers: list[int]) -> Tensor:
        """How much peer k learns from each teacher on each row, (K - 1, N)."""
        own = edges[k, teachers]
        rows = own[:, None].expand(-1, N)
        if options.gate == "correct":
            return rows * torch.stack([right[teacher] for teacher in teachers])
        if options.gate == "best":
            return rows * torch.stack([(first_best == t) & labelled for t in teachers])
        if options.gate == "confidence":
            of_label = torch.stack([-nll[teacher].detach() for teacher in teachers])
            return torch.where(labelled, _soft_weights(own, of_label), 0.0)
        if options.gate == "entropy":
            return _soft_weights(own, -entropies[teachers].detach())
        return rows

    def fixed(value: Tensor) -> Tensor:
        return value.detach() if options.detach_targets else value

    kl_rows = []
    for k in range(K):
        teachers = [teacher for teacher in range(K) if teacher != k]
        total = z[0].new_zeros(N)
        if teachers:
            total = _learned(
                weights_of(k, teachers), [fixed(z[teacher]) for teacher in teachers],
                [fixed(log_q[teacher]) for teacher in teachers], log_q[k], options, temperature,
            )  # fmt: skip
        kl_rows.append(torch.where(mimics, total * temperature**2, 0.0))
    ce_rows, kl_all = ce_rows * times, torch.stack(kl_rows) * times

    ce_count = (weight[y] * labelled * times).sum()
    kl_count = (mimics * times).sum()
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
        return torch.where(mimics, rows * times, 0.0).sum(dim=-1) / kl_count

    pairwise = torch.stack(
        [torch.stack([mean(_kl(log_q[a], log_q[b])) for b in range(K)]) for a in range(K)]
    )
    ensemble = torch.stack(log_p).exp().sum(dim=0).argmax(dim=1)
    stats = {
        "ce": ce,
        "kl": kl,
        "pairwise_kl": pairwise * temperature**2,
        "entropy": mean(entropies),
        "correct": (torch.stack(right) * times).sum(dim=1).double(),
        "ensemble_correct": (((ensemble == y) & labelled) * times).sum().double(),
    }
    return loss, {name: value.detach() for name, value in stats.items()}
