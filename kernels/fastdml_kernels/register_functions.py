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

from .device_functions import rounded_product, times
from .register_divergences import edge, exponential
from .register_reductions import reduced

# ---- memory


@triton.jit
def load_block(logits, labels, label_stride, sample_weight, ignore_index, block, N, cols,
               ROWS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
               READABLE: tl.constexpr):  # fmt: skip
    """The labels (ROWS,) of a block of rows; their weights, a tuple of one tensor (ROWS,), or ()
    without any; and the rows of all peers in their own dtypes: -inf past the readable classes. No
    load waits for another, so that all are on their way together."""
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
    W = ()
    if sample_weight is not None:
        W = (tl.load(sample_weight + n64, mask=inside, other=0.0).to(tl.float32),)
    return y, W, RAW


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
            Q = Q + (rounded_product(COOLED[k], (1.0 / SUMS_T[k])[:, None]),)
        else:
            LSE_T = LSE_T + (lse,)
            Q = Q + (rounded_product(E[k], (1.0 / SUMS[k])[:, None]),)
    return TOP, LSE, LSE_T, Z_Y, Q


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
def entropy_terms(Z, LSE, P, K: tl.constexpr):
    """Each class's part of the entropies of p = softmax(z)."""
    PARTS = ()
    for k in tl.static_range(K):
        PARTS = PARTS + (times(P[k], LSE[k][:, None] - Z[k]),)
    return PARTS


@triton.jit
def first_of_ensemble(P, cols, K: tl.constexpr, C: tl.constexpr):
    """The first class of the highest sum of all p."""
    total = tl.zeros_like(P[0])
    for k in tl.static_range(K):
        total += P[k]
    top = tl.max(total, axis=1)
    return tl.min(tl.where(total == top[:, None], cols[None, :], C), axis=1)


@triton.jit
def as_numbers(T, COUNT: tl.constexpr):
    """1.0 for true, 0.0 for false, of COUNT tensors."""
    OUT = ()
    for i in tl.static_range(COUNT):
        OUT = OUT + (tl.where(T[i], 1.0, 0.0),)
    return OUT


# ---- gradients


@triton.jit
def gradient_terms(P, Q, SLOPES, GATES, peer_weights, is_y, w_c, labelled, mimics,
                   p_row, y_row, c_row, kl_row, STUDENTS: tl.constexpr, K: tl.constexpr,
                   EDGE: tl.constexpr, GATED: tl.constexpr, SMOOTHED: tl.constexpr,
                   CAREFUL: tl.constexpr):  # fmt: skip
    """p_row p - y_row 1[c = y] - c_row w_c + kl_row slope of each peer k among STUDENTS, where the
    slope is SLOPES[k], or without any sum_l w_kl (q_k - q_l).

    CAREFUL: the first three terms have no part where `labelled` is false, the last none where
    `mimics` is; they are selected away, not multiplied by 0, as a factor or another peer may be
    infinite or NaN."""
    SLOPED: tl.constexpr = len(SLOPES) > 0
    UNIFORM: tl.constexpr = (peer_weights is None) and (not GATED) and (not SLOPED)
    FIRST: tl.constexpr = STUDENTS[0]
    ce = tl.where(is_y, -y_row[:, None], 0.0)  # of all peers, like all that has no k
    if SMOOTHED:
        ce -= c_row[:, None] * w_c[None, :]
    AWAY = ()  # differences to the first student
    if K > 1 and UNIFORM:
        NEXT: tl.constexpr = 1 if FIRST == 0 else 0
        away = Q[NEXT] - Q[FIRST]
        for k in tl.static_range(K):
            if k == FIRST:
                AWAY = AWAY + (tl.zeros_like(Q[0]),)
            elif k == NEXT:
                AWAY = AWAY + (away,)
            else:
                AWAY = AWAY + (Q[k] - Q[FIRST],)
        for k in tl.static_range(NEXT + 1, K):
            if k != FIRST:
                away += AWAY[k]
        kl_row *= EDGE
        shared = -kl_row[:, None] * away
    G = ()
    for i in tl.static_range(len(STUDENTS)):
        if K == 1:
            g = tl.fma(p_row[:, None], P[0], ce)
            if CAREFUL:
                g = tl.where(labelled[:, None], g, 0.0)
        elif UNIFORM and not CAREFUL:
            if len(STUDENTS) < K and STUDENTS[i] == FIRST:
                g = ce + shared
            else:
                g = tl.fma((K * kl_row)[:, None], AWAY[STUDENTS[i]], ce + shared)
            g = tl.fma(p_row[:, None], P[STUDENTS[i]], g)
        elif SLOPED and not CAREFUL:
            g = tl.fma(kl_row[:, None], SLOPES[STUDENTS[i]], ce)
            g = tl.fma(p_row[:, None], P[STUDENTS[i]], g)
        else:
            if UNIFORM:
                pull = tl.fma((K * kl_row)[:, None], AWAY[STUDENTS[i]], shared)
            elif SLOPED:
                pull = SLOPES[STUDENTS[i]]
            else:
                pull = tl.zeros_like(Q[0])
                for l in tl.static_range(K):  # noqa: E741
                    if l != STUDENTS[i]:
                        w = edge(STUDENTS[i], l, peer_weights, GATES, kl_row, K, EDGE, GATED)
                        pull += times(w[:, None] + 0.0 * pull, Q[STUDENTS[i]] - Q[l])
            if not UNIFORM:
                pull *= kl_row[:, None]
            g = tl.where(labelled[:, None], tl.fma(p_row[:, None], P[STUDENTS[i]], ce), 0.0)
            g += tl.where(mimics[:, None], pull, 0.0)
        G = G + (g,)
    return G


@triton.jit
def gradients(P, Q, SLOPES, GATES, peer_weights, is_y, w_c, labelled, mimics, p_row, y_row, c_row,
              kl_row, STUDENTS: tl.constexpr, K: tl.constexpr, EDGE: tl.constexpr,
              GATED: tl.constexpr, SMOOTHED: tl.constexpr):  # fmt: skip
    """`gradient_terms`, careful where any row must be."""
    WEIGHTED: tl.constexpr = GATED or peer_weights is not None
    if K == 1 or (WEIGHTED and len(SLOPES) == 0) or mimics.shape[0] > 1:
        G = gradient_terms(P, Q, SLOPES, GATES, peer_weights, is_y, w_c, labelled, mimics, p_row,
                           y_row, c_row, kl_row, STUDENTS, K, EDGE, GATED, SMOOTHED,
                           True)  # fmt: skip
    elif tl.min(tl.where(labelled & mimics, 1, 0), axis=0) == 1:
        G = gradient_terms(P, Q, SLOPES, GATES, peer_weights, is_y, w_c, labelled, mimics, p_row,
                           y_row, c_row, kl_row, STUDENTS, K, EDGE, GATED, SMOOTHED,
                           False)  # fmt: skip
    else:
        G = gradient_terms(P, Q, SLOPES, GATES, peer_weights, is_y, w_c, labelled, mimics, p_row,
                           y_row, c_row, kl_row, STUDENTS, K, EDGE, GATED, SMOOTHED,
                           True)  # fmt: skip
    return G
