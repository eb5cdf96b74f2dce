"""Mixed teachers in `coupled_rows`: a student's teacher is a mean of the other peers' probabilities
(target="ensemble") or of their logits (target="ensemble_logits").

Notation as in `wide_functions`: t_k is student k's mixed teacher, DIVISOR its teachers' weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import log_probability, times
from .divergences import ahead_terms, back_terms, divergence_of, log_ratios
from .wide_functions import edge, load_peers, log_probabilities, mean_probability


@triton.jit
def mean_logits(k: tl.constexpr, Z, peer_weights, GATES, divisor,
                K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Weighted mean of the other peers' logits, from differences to the first teacher, so that the
    mean of identical peers is exactly themselves."""
    base = Z[(0 if k else 1)]
    for back in tl.static_range(K):  # peers that do not teach have weight 0
        if K - 1 - back != k:
            w = edge(k, K - 1 - back, peer_weights, GATES, K, EDGE, GATED)
            base = tl.where(w != 0.0, Z[K - 1 - back], base)
    low = base
    mixed = tl.zeros_like(base)
    for l in tl.static_range(K):  # noqa: E741
        if l != k:
            w = edge(k, l, peer_weights, GATES, K, EDGE, GATED) / divisor
            low = tl.where(w != 0.0, tl.minimum(low, Z[l]), low)
            mixed += times(w, tl.where(Z[l] == base, 0.0, Z[l] - base))
    return tl.where(low == float("-inf"), low, base + mixed)


@triton.jit
def mean_logits_normalisers(logits, n64, peer_weights, GATES, DIVISOR, inv_t,
                            K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
                            READABLE: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr,
                            GATED: tl.constexpr):  # fmt: skip
    """One pass over the row: logsumexp of each student's `mean_logits` / T, by an online softmax
    with the steps of `online_sums` in one lane: of identical peers it is theirs, exactly."""
    M = ()
    SUM = ()
    for k in tl.static_range(K):
        M = M + (tl.cast(float("-inf"), tl.float32),)
        SUM = SUM + (tl.cast(0.0, tl.float32),)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, False)
        NEW_M = ()
        NEW_SUM = ()
        for k in tl.static_range(K):
            z = mean_logits(k, Z, peer_weights, GATES, DIVISOR[k], K, EDGE, GATED)
            m = tl.maximum(M[k], tl.max(z, axis=0))
            shift = tl.where(m == float("-inf"), 0.0, m)
            more = tl.sum(tl.exp((z - shift) * inv_t), axis=0)
            NEW_M = NEW_M + (m,)
            NEW_SUM = NEW_SUM + (tl.fma(SUM[k], tl.exp((M[k] - shift) * inv_t), more),)
        M = NEW_M
        SUM = NEW_SUM
    LSE = ()
    for k in tl.static_range(K):
        shift = tl.where(M[k] == float("-inf"), 0.0, M[k])
        LSE = LSE + (tl.fma(shift, tl.cast(inv_t, tl.float32), tl.log(SUM[k])),)
    return LSE


@triton.jit
def mixed_teacher(k: tl.constexpr, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                  K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                  TARGET: tl.constexpr, DIVERGENCE: tl.constexpr):  # fmt: skip
    """log t - top of student k's mixed teacher t, and t itself."""
    if TARGET == "ensemble":
        # the reverse divergence counts log t by the student's probability, however small t is
        FAR: tl.constexpr = DIVERGENCE == "reverse" or DIVERGENCE == "jeffreys"
        gap = mean_probability(k, D, peer_weights, GATES, DIVISOR[k], K, EDGE, GATED, FAR)
    else:
        z = mean_logits(k, Z, peer_weights, GATES, DIVISOR[k], K, EDGE, GATED)
        gap = log_probability(z, tl.cast(inv_t, tl.float32), MIX_LSE[k], True) - top
    return gap, tl.exp(gap + top)


@triton.jit
def parts_slope(q, gap, d, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """q times the derivative of a divergence's `ahead` with respect to its teacher t, a mean of
    probabilities in which the teacher q has a part; gap = log t, and d = log of the student's
    probability, each relative to the same. Below 2**-126 GPUs take a logarithm's argument for 0:
    gap is -inf then, while q is not yet 0."""
    slope = gap - d
    if DIVERGENCE == "jsd":
        slope, _ = log_ratios(slope, BETA)
    return times(tl.where(gap == float("-inf"), 0.0, q), slope)


@triton.jit
def ratio_excess(apart, log_share):
    """q_l (q_k - t) / t for the gradient of the reverse divergence into the teacher l of a mean of
    probabilities t: 0 for identical peers, and bounded, however small q_l and t are. apart:
    q_k - t, log_share: log (q_l / t)."""
    share = tl.exp(tl.where(log_share == log_share, log_share, float("-inf")))
    return times(apart, share)


@triton.jit
def mixed_divergences(logits, n64, LSE_T, teacher, student, peer_weights, GATES, DIVISOR, MIX_LSE,
                      inv_t,
                      K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
                      READABLE: tl.constexpr, BLOCK_C: tl.constexpr, PEERS: tl.constexpr,
                      EDGE: tl.constexpr, GATED: tl.constexpr, TEMPERED: tl.constexpr,
                      TARGET: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr,
                      TO_PEERS: tl.constexpr):  # fmt: skip
    """One pass over the row for what the gradients of mixed teachers t_k contain.

    AHEAD, BACK: the parts of each student's divergence from t_k, as in `divergences`.
    toward, ratios (PEERS, PEERS): the sums of `parts_slope` and of q_l (q_k - t_k) / t_k at [l, k],
    for the gradient of a mean of probabilities into its teacher l (TO_PEERS).
    """
    AHEAD = ()
    BACK = ()
    for k in tl.static_range(K):
        AHEAD = AHEAD + (tl.cast(0.0, tl.float32),)
        BACK = BACK + (tl.cast(0.0, tl.float32),)
    toward = tl.zeros((PEERS, PEERS), tl.float32)
    ratios = tl.zeros((PEERS, PEERS), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, False)
        top, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
        NEW_AHEAD = ()
        NEW_BACK = ()
        for k in tl.static_range(K):
            gap, t = mixed_teacher(k, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                                   K, EDGE, GATED, TARGET, DIVERGENCE)  # fmt: skip
            ahead = AHEAD[k]
            if DIVERGENCE != "reverse":
                ahead += tl.sum(ahead_terms(t, gap - D[k], DIVERGENCE, BETA), axis=0)
            back = BACK[k]
            if DIVERGENCE != "forward":
                back += tl.sum(back_terms(Q[k], gap - D[k], DIVERGENCE, BETA), axis=0)
            NEW_AHEAD = NEW_AHEAD + (ahead,)
            NEW_BACK = NEW_BACK + (back,)
            if TO_PEERS:
                for l in tl.static_range(K):  # noqa: E741
                    if l != k:
                        at = (teacher == l) & (student == k)
                        if DIVERGENCE != "reverse":
                            part = tl.sum(parts_slope(Q[l], gap, D[k], DIVERGENCE, BETA), axis=0)
                            toward += tl.where(at, part, 0.0)
                        if DIVERGENCE == "reverse" or DIVERGENCE == "jeffreys":
                            part = tl.sum(ratio_excess(Q[k] - t, D[l] - gap), axis=0)
                            ratios += tl.where(at, part, 0.0)
        AHEAD = NEW_AHEAD
        BACK = NEW_BACK
    return AHEAD, BACK, toward, ratios


@triton.jit
def mixed_block(Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr, TARGET: tl.constexpr,
                DIVERGENCE: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """One block's share of each student's divergence from its mixed teacher."""
    OUT = ()
    for k in tl.static_range(K):
        gap, t = mixed_teacher(k, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                               K, EDGE, GATED, TARGET, DIVERGENCE)  # fmt: skip
        d = gap - D[k]
        value = divergence_of(ahead_terms(t, d, DIVERGENCE, BETA),
                              back_terms(Q[k], d, DIVERGENCE, BETA), DIVERGENCE, BETA)  # fmt: skip
        OUT = OUT + (tl.sum(value, axis=0),)
    return OUT


@triton.jit
def mixed_kl(AHEAD, BACK, WEIGHT, K: tl.constexpr, DIVERGENCE: tl.constexpr,
             BETA: tl.constexpr):  # fmt: skip
    """Each student's KL term, its teachers' weights included, from the parts of its divergence."""
    KL = ()
    for k in tl.static_range(K):
        value = divergence_of(AHEAD[k], BACK[k], DIVERGENCE, BETA)
        KL = KL + (times(WEIGHT[k], value),)
    return KL
