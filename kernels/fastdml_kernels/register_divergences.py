"""Divergences in `register_rows`: who teaches whom on each row, and the students' losses from it.

Tuples in capitals have one tensor a peer, as in `register_functions`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .device_functions import (
    learned_from,
    log_mean,
    log_probability,
    put,
    soft_edge,
    soft_gates,
    times,
)
from .divergences import log_ratios
from .register_reductions import reduce_group, reduced, row_totals, selected, weighed

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
MOST_SUBTRACTED: tl.constexpr = tl.constexpr(32.0)  # in `quick_divergences`: rounded to 2**-19


@triton.jit
def exponential(x):
    """exp(x), where results below 2**-126 are 0: so a GPU has it as one instruction. To keep them,
    `tl.exp` brackets that instruction with three more."""
    if INTERPRETED:  # Triton's interpreter has no device libraries
        y = tl.exp(x)
        y = tl.where(y < 2.0**-126, 0.0, y)
    else:
        y = libdevice.fast_expf(x)
    return y


@triton.jit
def log_probabilities(Z, LSE_T, inv_t, K: tl.constexpr, TEMPERED: tl.constexpr):
    """log q of each peer."""
    LOG_Q = ()
    for k in tl.static_range(K):
        LOG_Q = LOG_Q + (log_probability(Z[k], inv_t, LSE_T[k][:, None], TEMPERED),)
    return LOG_Q


# ---- divergences: for each student k the sum over the teachers l of w KL(q_l || q_k)


@triton.jit
def quick_divergences(Z, LSE_T, Q, cols, inv_t, K: tl.constexpr, C: tl.constexpr,
                      TEMPERED: tl.constexpr):  # fmt: skip
    """With w = 1 for all pairs. NaN where a peer gives a class no probability (0 * inf), and where
    the differences are of sums so large that little would be left of a small one's digits.

    With g_l = log q_l - log q_0 it is sum_l q_l g_l - g_k sum_l q_l: totals of the peers serve all
    students. Identical peers have g = 0, exactly. The first sum is what all teach the first peer,
    which may be far from peers that are near each other."""
    GAP = ()
    for l in tl.static_range(1, K):  # noqa: E741
        gap = log_probability(Z[l] - Z[0], inv_t, (LSE_T[l] - LSE_T[0])[:, None], TEMPERED)
        if cols.shape[0] != C:
            gap = tl.where((cols < C)[None, :], gap, 0.0)
        GAP = GAP + (gap,)
    if K == 2:
        KL = reduced((Q[1] * GAP[0], -Q[0] * GAP[0]), 2, "sum")
    else:
        mass = Q[0] + Q[1]
        energy = Q[1] * GAP[0]
        for l in tl.static_range(2, K):  # noqa: E741
            mass += Q[l]
            energy = tl.fma(Q[l], GAP[l - 1], energy)
        PARTS = (energy,)
        for k in tl.static_range(1, K):
            PARTS = PARTS + (mass * GAP[k - 1],)
        SUMS = reduced(PARTS, K, "sum")
        first = tl.where(SUMS[0] < MOST_SUBTRACTED, SUMS[0], float("nan"))
        KL = (first,)
        for k in tl.static_range(1, K):
            KL = KL + (first - SUMS[k],)
    return KL


@triton.jit
def careful_divergences(Z, LSE_T, Q, inv_t, K: tl.constexpr, TEMPERED: tl.constexpr):
    """The same where peers may rule classes out. d_l = log q_l - max over peers is 0 for identical
    peers, and -inf only where a peer rules a class out and another does not."""
    LOG_Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
    top = highest(LOG_Q, K)
    mass = tl.zeros_like(Q[0])
    energy = tl.zeros_like(Q[0])
    for l in tl.static_range(K):  # noqa: E741
        mass += Q[l]
        energy += times(Q[l], LOG_Q[l] - top)
    PARTS = ()
    for k in tl.static_range(K):
        PARTS = PARTS + (energy - times(mass, LOG_Q[k] - top),)
    return reduced(PARTS, K, "sum")


@triton.jit
def highest(LOG_Q, K: tl.constexpr):
    """The maximum over the peers, and 0 where all have -inf."""
    top = LOG_Q[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, LOG_Q[k])
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def uniform_divergences(Z, LSE_T, Q, mimics, cols, inv_t, K: tl.constexpr, C: tl.constexpr,
                        EDGE: tl.constexpr, TEMPERED: tl.constexpr):  # fmt: skip
    """With w = EDGE for all pairs."""
    if mimics.shape[0] > 1:
        KL = careful_divergences(Z, LSE_T, Q, inv_t, K, TEMPERED)
    else:
        KL = quick_divergences(Z, LSE_T, Q, cols, inv_t, K, C, TEMPERED)
        total = KL[0]
        for k in tl.static_range(1, K):
            total += KL[k]
        if tl.max(tl.where(mimics & (total != total), 1, 0), axis=0) == 1:
            KL = careful_divergences(Z, LSE_T, Q, inv_t, K, TEMPERED)
    OUT = ()
    for k in tl.static_range(K):
        OUT = OUT + (KL[k] * EDGE,)
    return OUT


@triton.jit
def pair_group(LOG_Q, Q, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
               K: tl.constexpr):  # fmt: skip
    """COUNT of the `pair_divergences`, by one reduction."""
    PARTS = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        PARTS = PARTS + (pair_terms(LOG_Q, Q, i // (K - 1), i % (K - 1)),)
    return reduce_group(PARTS, 0, COUNT, SIZE, "sum")


@triton.jit
def pair_terms(LOG_Q, Q, l: tl.constexpr, other: tl.constexpr):  # noqa: E741
    """Each class's part of KL(q_l || q_k), where k is one of the other peers."""
    k: tl.constexpr = other + 1 if other >= l else other
    return times(Q[l], LOG_Q[l] - LOG_Q[k])


@triton.jit
def put_pairs(packed, LOG_Q, Q, mimics, W, K: tl.constexpr, FIRST_PLACE: tl.constexpr,
              S: tl.constexpr):  # fmt: skip
    """`packed` with the sums of KL(q_l || q_k) added, whose matrix [l, k] begins at FIRST_PLACE."""
    PAIRS: tl.constexpr = K * (K - 1)
    SIZE: tl.constexpr = 8 if PAIRS > 2 else 2
    for first in tl.static_range(0, PAIRS, SIZE):
        SUMS = pair_group(LOG_Q, Q, first, SIZE if PAIRS - first > SIZE else PAIRS - first, SIZE, K)
        OF_ROWS = weighed(selected(mimics, SUMS, len(SUMS)), W, len(SUMS))
        TOTALS = row_totals(OF_ROWS, len(SUMS))
        for i in tl.static_range(len(SUMS)):  # the diagonal has no place among the pairs
            packed = put(packed, FIRST_PLACE + first + i + (first + i) // K + 1, TOTALS[i], S)
    return packed


@triton.jit
def gates_by_likelihood(NLL, labelled, peer_weights, K: tl.constexpr, EDGE: tl.constexpr):
    """`soft_gates` by the probabilities that the peers give the label."""
    LOG_G = ()
    for l in tl.static_range(K):  # noqa: E741
        LOG_G = LOG_G + (tl.where(labelled, -NLL[l], float("-inf")),)
    return soft_gates(LOG_G, peer_weights, K, EDGE)


@triton.jit
def gates_by_sharpness(ENTROPY, peer_weights, K: tl.constexpr, EDGE: tl.constexpr):
    """`soft_gates` by exp(-entropy), the inverse perplexities."""
    LOG_G = ()
    for l in tl.static_range(K):  # noqa: E741
        LOG_G = LOG_G + (-ENTROPY[l],)
    return soft_gates(LOG_G, peer_weights, K, EDGE)


@triton.jit
def edge(k: tl.constexpr, l: tl.constexpr, peer_weights, GATES, like,  # noqa: E741
         K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """How much peer k learns from peer l on each row, in the shape of `like` (ROWS,)."""
    w = tl.full(like.shape, EDGE, tl.float32)
    if peer_weights is not None:
        w = learned_from(k, l, peer_weights, K, EDGE) + 0.0 * w
    if GATED:
        if len(GATES) == K:
            w *= GATES[l]
        else:
            w = soft_edge(k, l, w, GATES, K)
    return w


@triton.jit
def weighted_divergences(LOG_Q, Q, peer_weights, GATES, like,
                         K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """With any w. A student's pairs share a reduction: all pairs would need too many registers."""
    KL = ()
    for k in tl.static_range(K):
        PARTS = ()
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                PARTS = PARTS + (times(Q[l], LOG_Q[l] - LOG_Q[k]),)
        SUMS = reduced(PARTS, K - 1, "sum")
        kl = tl.zeros_like(like)
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                kl += times(edge(k, l, peer_weights, GATES, kl, K, EDGE, GATED),
                            SUMS[l - 1 if l > k else l])  # fmt: skip
        KL = KL + (kl,)
    return KL


@triton.jit
def ensemble_divergences(LOG_Q, Q, peer_weights, GATES, like,
                         K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """From one teacher for each student, the weighted mean of the other peers' q, instead."""
    top = highest(LOG_Q, K)
    PARTS = ()
    for k in tl.static_range(K):
        mass = tl.zeros_like(top)
        mixed = tl.zeros_like(top)
        w_sum = tl.zeros_like(like)
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w = edge(k, l, peer_weights, GATES, w_sum, K, EDGE, GATED)
                w_sum += w
                mass += times(w[:, None] + 0.0 * mass, Q[l])
                mixed += times(w[:, None] + 0.0 * mass, exponential(LOG_Q[l] - top))
        scale = tl.where(w_sum > 0, w_sum, 1.0)
        log_mixed = log_mean(mixed, scale[:, None])
        # Below 2**-126 GPUs take exponentials and arguments of logarithms for 0, but not mass.
        mass = tl.where(log_mixed == float("-inf"), 0.0, mass)
        part = times(mass, log_mixed - (LOG_Q[k] - top))
        if K > 4:  # together they would need too many registers
            PARTS = PARTS + (tl.sum(part, axis=1),)
        else:
            PARTS = PARTS + (part,)
    if K <= 4:
        PARTS = reduced(PARTS, K, "sum")
    return PARTS


# ---- divergences whose gradients hold an expectation under the student. With A = log q - log t of
# the student q and a teacher t ("reverse", "jeffreys"), or log q - log m ("jsd": see `log_ratios`),
# the gradient with respect to the student's z / T is made of q (A - sum q A), and of q - t.


@triton.jit
def add_teacher(forward, inner, pull, w, mass, apart, d, DIVERGENCE: tl.constexpr,
                JSD_BETA: tl.constexpr):  # fmt: skip
    """Adds what a teacher t of weight w contributes: `forward` w t (log t - ...), `inner` w A,
    `pull` the weighted difference q - t, given as `apart`. mass: w t. All are (ROWS, BLOCK_C)."""
    if DIVERGENCE == "jsd":
        to_teacher, to_student = log_ratios(d, JSD_BETA)
        forward += times(mass, to_teacher)
        inner += times(w, to_student)
    else:
        inner += times(w, -d)
        if DIVERGENCE == "jeffreys":
            forward += times(mass, d)
            pull += apart
    return forward, inner, pull


@triton.jit
def parts_from_peers(k: tl.constexpr, LOG_Q, Q, peer_weights, GATES, like,
                     K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                     DIVERGENCE: tl.constexpr, JSD_BETA: tl.constexpr):  # fmt: skip
    """The sums of `add_teacher` over student k's teachers."""
    forward = tl.zeros_like(Q[0])
    inner = tl.zeros_like(Q[0])
    pull = tl.zeros_like(Q[0])
    for l in tl.static_range(K):  # noqa: E741
        if l != k:
            w = tl.broadcast_to(edge(k, l, peer_weights, GATES, like, K, EDGE, GATED)[:, None],
                                Q[0].shape)  # fmt: skip
            forward, inner, pull = add_teacher(
                forward, inner, pull, w, times(w, Q[l]), times(w, Q[k] - Q[l]),
                LOG_Q[l] - LOG_Q[k], DIVERGENCE, JSD_BETA,
            )  # fmt: skip
    return forward, inner, pull


@triton.jit
def parts_from_ensemble(k: tl.constexpr, LOG_Q, Q, peer_weights, GATES, like,
                        K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                        DIVERGENCE: tl.constexpr, JSD_BETA: tl.constexpr):  # fmt: skip
    """Those of one teacher, the weighted mean of the other peers' q. Its logarithm is taken from
    the largest of them on: the student is no part of it, and may be far above them all."""
    top = tl.full(Q[0].shape, float("-inf"), tl.float32)
    for l in tl.static_range(K):  # noqa: E741
        if l != k:
            w = edge(k, l, peer_weights, GATES, like, K, EDGE, GATED)[:, None] + 0.0 * Q[k]
            top = tl.maximum(top, tl.where(w != 0.0, LOG_Q[l], float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    mixed = tl.zeros_like(top)
    mass = tl.zeros_like(top)
    apart = tl.zeros_like(top)
    w_sum = tl.zeros_like(top)
    for l in tl.static_range(K):  # noqa: E741
        if l != k:
            w = tl.broadcast_to(edge(k, l, peer_weights, GATES, like, K, EDGE, GATED)[:, None],
                                top.shape)  # fmt: skip
            w_sum += w
            mixed += times(w, exponential(LOG_Q[l] - top))
            mass += times(w, Q[l])
            apart += times(w, Q[k] - Q[l])
    log_t = log_mean(mixed, tl.where(w_sum > 0, w_sum, 1.0))  # less top
    zeros = tl.zeros_like(top)
    return add_teacher(zeros, zeros, zeros, w_sum, mass, apart, log_t - (LOG_Q[k] - top),
                       DIVERGENCE, JSD_BETA)  # fmt: skip


@triton.jit
def even_pair(LOG_Q, Q, w_0, w_1):
    """`sloped_divergences` of two peers with half a share each in the mixture, which then is one
    for both. w_0, w_1 (ROWS,): how much each learns from the other."""
    ratio_1, ratio_0 = log_ratios(LOG_Q[1] - LOG_Q[0], 0.5)
    SUMS = reduced((times(Q[0], ratio_0), times(Q[1], ratio_1)), 2, "sum")
    both = 0.5 * (SUMS[0] + SUMS[1])
    slope_0 = times(Q[0], ratio_0 - SUMS[0][:, None])
    slope_1 = times(Q[1], ratio_1 - SUMS[1][:, None])
    half_0 = tl.broadcast_to((0.5 * w_0)[:, None], slope_0.shape)
    half_1 = tl.broadcast_to((0.5 * w_1)[:, None], slope_1.shape)
    return (times(w_0, both), times(w_1, both)), (times(half_0, slope_0), times(half_1, slope_1))


@triton.jit
def divergences_of_each(LOG_Q, Q, peer_weights, GATES, like,
                        K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                        TARGET: tl.constexpr, DIVERGENCE: tl.constexpr,
                        JSD_BETA: tl.constexpr):  # fmt: skip
    """`sloped_divergences`, one student after the other."""
    PARTS = ()
    INNER = ()
    PULL = ()
    SUMS = ()
    for k in tl.static_range(K):
        if TARGET == "ensemble":
            forward, inner, pull = parts_from_ensemble(
                k, LOG_Q, Q, peer_weights, GATES, like, K, EDGE, GATED, DIVERGENCE, JSD_BETA
            )
        else:
            forward, inner, pull = parts_from_peers(
                k, LOG_Q, Q, peer_weights, GATES, like, K, EDGE, GATED, DIVERGENCE, JSD_BETA
            )
        INNER = INNER + (inner,)
        PULL = PULL + (pull,)
        if DIVERGENCE == "reverse":
            PARTS = PARTS + (times(Q[k], inner),)
        elif DIVERGENCE == "jsd" and K > 2:  # together they would need too many registers
            SUMS = SUMS + reduced((times(Q[k], inner), forward), 2, "sum")
        else:
            PARTS = PARTS + (times(Q[k], inner), forward)
    if len(PARTS) > 0:
        SUMS = reduced(PARTS, len(PARTS), "sum")
    EACH: tl.constexpr = 1 if DIVERGENCE == "reverse" else 2
    KL = ()
    SLOPES = ()
    for k in tl.static_range(K):
        back = SUMS[EACH * k]
        slope = times(Q[k], INNER[k] - back[:, None])
        if DIVERGENCE == "reverse":
            KL = KL + (back,)
        elif DIVERGENCE == "jeffreys":
            KL = KL + (0.5 * (SUMS[EACH * k + 1] + back),)
            slope = 0.5 * (PULL[k] + slope)
        else:
            KL = KL + (JSD_BETA * SUMS[EACH * k + 1] + (1.0 - JSD_BETA) * back,)
            slope *= 1.0 - JSD_BETA
        SLOPES = SLOPES + (slope,)
    return KL, SLOPES


@triton.jit
def sloped_divergences(LOG_Q, Q, peer_weights, GATES, like,
                       K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                       TARGET: tl.constexpr, DIVERGENCE: tl.constexpr,
                       JSD_BETA: tl.constexpr):  # fmt: skip
    """Each student's divergences from its teachers, weighted and added up, and the gradient of the
    sum with respect to its z / T."""
    if DIVERGENCE == "jsd" and JSD_BETA == 0.5 and K == 2:
        w_0 = edge(0, 1, peer_weights, GATES, like, K, EDGE, GATED)
        w_1 = edge(1, 0, peer_weights, GATES, like, K, EDGE, GATED)
        KL, SLOPES = even_pair(LOG_Q, Q, w_0, w_1)
    else:
        KL, SLOPES = divergences_of_each(LOG_Q, Q, peer_weights, GATES, like, K, EDGE, GATED,
                                         TARGET, DIVERGENCE, JSD_BETA)  # fmt: skip
    return KL, SLOPES
