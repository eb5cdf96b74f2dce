"""Steps of `register_rows`, which holds the rows of all peers in registers.

Tuples in capitals have one tensor a peer: (ROWS, BLOCK_C) with a number for each class, or (ROWS,)
with one for each row. Their reductions are in `register_reductions`.

The usual row has a label and no class that a peer rules out. What other rows need, selections in
place of products with 0, costs more than the arithmetic itself, so tiles of one row have both and
branch. (Tiles of several rows would first have to ask all of them.)
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .device_functions import log_probability, put, times
from .register_reductions import reduce_group, reduced, row_totals

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


# ---- memory


@triton.jit
def load_block(logits, labels, label_stride, ignore_index, block, N, cols, ROWS: tl.constexpr,
               K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
               READABLE: tl.constexpr):  # fmt: skip
    """The labels (ROWS,) of a block of rows, and the rows of all peers in their own dtypes: -inf
    past the readable classes. No load waits for another, so that all are on their way together."""
    n = block * ROWS + tl.arange(0, ROWS)
    n64 = n.to(tl.int64)
    if n.dtype == tl.int32:  # a block after the last may begin beyond int32
        inside = n.to(tl.uint32, bitcast=True) < N
    else:
        inside = n < N
    RAW = ()
    for k in tl.static_range(K):
        row = tl.load(logits[k] + n64[:, None] * STRIDES[k][0] + cols[None, :] * STRIDES[k][1],
                      mask=inside[:, None] & (cols < READABLE[k])[None, :], other=float("-inf"),
                      eviction_policy="evict_first")  # fmt: skip
        RAW = RAW + (row,)
    y = tl.load(labels + n64 * label_stride, mask=inside, other=ignore_index)
    return y, RAW


@triton.jit
def widened(RAW, cols, K: tl.constexpr, C: tl.constexpr, READABLE: tl.constexpr):
    """The logits in float32, -inf past the last class."""
    Z = ()
    for k in tl.static_range(K):
        z = RAW[k].to(tl.float32)
        if READABLE[k] != C:
            z = tl.where((cols < C)[None, :], z, float("-inf"))
        Z = Z + (z,)
    return Z


@triton.jit
def store_row(grad, g, n64, inside, cols, stride: tl.constexpr, C: tl.constexpr):
    """Writes one peer's gradient rows."""
    tl.store(grad + n64[:, None] * stride + cols[None, :], g.to(grad.dtype.element_ty),
             mask=inside[:, None] & (cols < C)[None, :], eviction_policy="evict_first")  # fmt: skip


# ---- what a row's losses are made of


@triton.jit
def normalised(Z, is_y, inv_t, K: tl.constexpr, TEMPERED: tl.constexpr):
    """For each peer the maximum, logsumexp(z), logsumexp(z / T), the label's logit, and
    q = softmax(z / T)."""
    TOP = reduced(Z, K, "max")
    E = ()
    AT_LABEL = ()
    COOLED = ()
    for k in tl.static_range(K):
        E = E + (exponential(Z[k] - TOP[k][:, None]),)
        AT_LABEL = AT_LABEL + (tl.where(is_y, Z[k], 0.0),)
        if TEMPERED:  # products are fused by name: see `log_probability`
            top_t = TOP[k] * inv_t
            COOLED = COOLED + (exponential(tl.fma(Z[k], inv_t, -top_t[:, None])),)
    SUMS = reduced(E + AT_LABEL, 2 * K, "sum")
    if TEMPERED:
        SUMS_T = reduced(COOLED, K, "sum")
    LSE = ()
    LSE_T = ()
    Z_Y = ()
    Q = ()
    for k in tl.static_range(K):
        lse = TOP[k] + tl.log(SUMS[k])
        LSE = LSE + (lse,)
        Z_Y = Z_Y + (SUMS[K + k],)
        if TEMPERED:
            LSE_T = LSE_T + (tl.fma(TOP[k], inv_t, tl.log(SUMS_T[k])),)
            Q = Q + (COOLED[k] * (1.0 / SUMS_T[k])[:, None],)
        else:
            LSE_T = LSE_T + (lse,)
            Q = Q + (E[k] * (1.0 / SUMS[k])[:, None],)
    return TOP, LSE, LSE_T, Z_Y, Q


@triton.jit
def log_probabilities(Z, LSE_T, inv_t, K: tl.constexpr, TEMPERED: tl.constexpr):
    """log q of each peer."""
    LOG_Q = ()
    for k in tl.static_range(K):
        LOG_Q = LOG_Q + (log_probability(Z[k], inv_t, LSE_T[k][:, None], TEMPERED),)
    return LOG_Q


@triton.jit
def probabilities(Z, LSE, K: tl.constexpr):
    """softmax(z) of each peer."""
    P = ()
    for k in tl.static_range(K):
        P = P + (exponential(Z[k] - LSE[k][:, None]),)
    return P


@triton.jit
def cross_entropies(Z, LSE, NLL, w_c, w_y, labelled, label_smoothing,
                    K: tl.constexpr, C: tl.constexpr, SMOOTHED: tl.constexpr):  # fmt: skip
    """Each peer's cross-entropy, 0 without a label. w_c: the classes' weights, w_y: the label's."""
    BELOW = ()
    if SMOOTHED:
        for k in tl.static_range(K):
            BELOW = BELOW + (times(w_c[None, :] + tl.zeros_like(Z[0]), LSE[k][:, None] - Z[k]),)
        BELOW = reduced(BELOW, K, "sum")
    CE = ()
    for k in tl.static_range(K):
        ce = w_y * NLL[k]
        if SMOOTHED:
            ce = (1.0 - label_smoothing) * ce + label_smoothing / C * BELOW[k]
        CE = CE + (tl.where(labelled, ce, 0.0),)
    return CE


@triton.jit
def right(Z, TOP, NLL, labelled, y, cols, K: tl.constexpr, C: tl.constexpr):
    """Whether the label is the first class of the highest logit. A peer that is NaN is never
    right."""
    AT = ()
    for k in tl.static_range(K):
        AT = AT + (tl.where(Z[k] == TOP[k][:, None], cols[None, :], C),)
    FIRST = reduced(AT, K, "min")
    OUT = ()
    for k in tl.static_range(K):
        OUT = OUT + (labelled & (FIRST[k] == y) & (NLL[k] == NLL[k]),)
    return OUT


@triton.jit
def entropies(Z, LSE, P, cols, K: tl.constexpr, C: tl.constexpr):
    """The entropies of p = softmax(z), and the first class of the highest sum of all p."""
    total = tl.zeros_like(P[0])
    PARTS = ()
    for k in tl.static_range(K):
        total += P[k]
        PARTS = PARTS + (times(P[k], LSE[k][:, None] - Z[k]),)
    top = tl.max(total, axis=1)
    first = tl.min(tl.where(total == top[:, None], cols[None, :], C), axis=1)
    return reduced(PARTS, K, "sum"), first


@triton.jit
def selected(mask, T, COUNT: tl.constexpr):
    """Each of COUNT tensors (ROWS,) where `mask` is true, 0 elsewhere."""
    OUT = ()
    for i in tl.static_range(COUNT):
        OUT = OUT + (tl.where(mask, T[i], 0.0),)
    return OUT


@triton.jit
def as_numbers(T, COUNT: tl.constexpr):
    """1.0 for true, 0.0 for false, of COUNT tensors."""
    OUT = ()
    for i in tl.static_range(COUNT):
        OUT = OUT + (tl.where(T[i], 1.0, 0.0),)
    return OUT


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
def put_pairs(packed, LOG_Q, Q, mimics, K: tl.constexpr, FIRST_PLACE: tl.constexpr,
              S: tl.constexpr):  # fmt: skip
    """`packed` with the sums of KL(q_l || q_k) added, whose matrix [l, k] begins at FIRST_PLACE."""
    PAIRS: tl.constexpr = K * (K - 1)
    SIZE: tl.constexpr = 8 if PAIRS > 2 else 2
    for first in tl.static_range(0, PAIRS, SIZE):
        SUMS = pair_group(LOG_Q, Q, first, SIZE if PAIRS - first > SIZE else PAIRS - first, SIZE, K)
        TOTALS = row_totals(selected(mimics, SUMS, len(SUMS)), len(SUMS))
        for i in tl.static_range(len(SUMS)):  # the diagonal has no place among the pairs
            packed = put(packed, FIRST_PLACE + first + i + (first + i) // K + 1, TOTALS[i], S)
    return packed


@triton.jit
def edge(k: tl.constexpr, l: tl.constexpr, peer_weights, GATES, like,  # noqa: E741
         K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """How much peer k learns from peer l on each row, in the shape of `like` (ROWS,)."""
    w = tl.full(like.shape, EDGE, tl.float32)
    if peer_weights is not None:
        w = tl.load(peer_weights + k * K + l).to(tl.float32) + 0.0 * w
    if GATED:
        w *= GATES[l]
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
        log_mixed = tl.log(mixed / scale[:, None])
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


# ---- gradients


@triton.jit
def gradient_terms(P, Q, GATES, peer_weights, is_y, w_c, labelled, mimics,
                   p_row, y_row, c_row, kl_row, K: tl.constexpr, EDGE: tl.constexpr,
                   GATED: tl.constexpr, SMOOTHED: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """p_row p - y_row 1[c = y] - c_row w_c + kl_row sum_l w_kl (q_k - q_l) of each peer k.

    CAREFUL: the first three terms have no part where `labelled` is false, the last none where
    `mimics` is; they are selected away, not multiplied by 0, as a factor or another peer may be
    infinite or NaN."""
    UNIFORM: tl.constexpr = peer_weights is None and not GATED
    ce = tl.where(is_y, -y_row[:, None], 0.0)  # of all peers, like all that has no k
    if SMOOTHED:
        ce -= c_row[:, None] * w_c[None, :]
    AWAY = (tl.zeros_like(Q[0]),)  # differences to the first peer
    if K > 1 and UNIFORM:
        away = Q[1] - Q[0]
        AWAY = AWAY + (away,)
        for k in tl.static_range(2, K):
            AWAY = AWAY + (Q[k] - Q[0],)
            away += AWAY[k]
        kl_row *= EDGE
        shared = -kl_row[:, None] * away
    G = ()
    for k in tl.static_range(K):
        if K == 1:
            g = tl.fma(p_row[:, None], P[k], ce)
            if CAREFUL:
                g = tl.where(labelled[:, None], g, 0.0)
        elif UNIFORM and not CAREFUL:
            g = tl.fma((K * kl_row)[:, None], AWAY[k], ce + shared)
            g = tl.fma(p_row[:, None], P[k], g)
        else:
            if UNIFORM:
                pull = tl.fma((K * kl_row)[:, None], AWAY[k], shared)
            else:
                pull = tl.zeros_like(Q[0])
                for l in tl.static_range(K):  # noqa: E741
                    if l != k:
                        w = edge(k, l, peer_weights, GATES, kl_row, K, EDGE, GATED)
                        pull += times(w[:, None] + 0.0 * pull, Q[k] - Q[l])
                pull *= kl_row[:, None]
            g = tl.where(labelled[:, None], tl.fma(p_row[:, None], P[k], ce), 0.0)
            g += tl.where(mimics[:, None], pull, 0.0)
        G = G + (g,)
    return G


@triton.jit
def gradients(P, Q, GATES, peer_weights, is_y, w_c, labelled, mimics, p_row, y_row, c_row, kl_row,
              K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
              SMOOTHED: tl.constexpr):  # fmt: skip
    """`gradient_terms`, careful where any row must be."""
    if K == 1 or GATED or peer_weights is not None or mimics.shape[0] > 1:
        G = gradient_terms(P, Q, GATES, peer_weights, is_y, w_c, labelled, mimics,
                           p_row, y_row, c_row, kl_row, K, EDGE, GATED, SMOOTHED, True)  # fmt: skip
    elif tl.min(tl.where(labelled & mimics, 1, 0), axis=0) == 1:
        G = gradient_terms(P, Q, GATES, peer_weights, is_y, w_c, labelled, mimics,
                           p_row, y_row, c_row, kl_row, K, EDGE, GATED, SMOOTHED,
                           False)  # fmt: skip
    else:
        G = gradient_terms(P, Q, GATES, peer_weights, is_y, w_c, labelled, mimics,
                           p_row, y_row, c_row, kl_row, K, EDGE, GATED, SMOOTHED, True)  # fmt: skip
    return G
