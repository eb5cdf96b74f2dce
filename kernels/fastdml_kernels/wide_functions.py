"""Steps of the two kernels for wide rows, `wide_rows` and `coupled_rows`, which share them.

Both give a program one sample at a time and walk its K rows of C logits in blocks of BLOCK_C
classes. Numbers of which there is one a peer, or one a pair of peers, lie in tensors (PEERS,) and
(PEERS, PEERS) spread over the program's threads (PEERS is K rounded up to a power of two): a scalar
each would take a register in every thread, and 16 peers would spill.

Notation as in `register_rows`: z logits, p = softmax(z), q = softmax(z / T), K peers, N samples,
C classes. Tuples of K blocks or scalars have names in capitals: Z[k] belongs to peer k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import joined, log_mean, log_probability, put, soft_edge, soft_gates, times
from .divergences import divergence_of

# ---- reading a row


@triton.jit
def read_label(labels, label_stride, ignore_index, class_weight, sample_weight, n64,
               C: tl.constexpr, MIMIC_IGNORED: tl.constexpr):  # fmt: skip
    """Row n's label y; whether it has one (labelled), whether y is a class (fits), whether it is
    neither a class nor ignore_index (misfit), whether the KL term counts the row (mimics); the
    weight of the label's class, 0 without a label; and the row's own weight.

    A misfit is never used as an index; its row becomes NaN, so that it shows. A row of weight 0 has
    no label and does not mimic.
    """
    y = tl.load(labels + n64 * label_stride)
    labelled = y != ignore_index
    fits = (y >= 0) & (y < C)
    misfit = labelled & (fits == 0)
    mimics = labelled
    if MIMIC_IGNORED:
        mimics = y == y
    w_y = tl.where(labelled, 1.0, 0.0)
    if class_weight is not None:
        w_y = tl.load(class_weight + y, mask=labelled & fits, other=0.0).to(tl.float32)
    w_row = tl.cast(1.0, tl.float32)
    if sample_weight is not None:
        w_row = tl.load(sample_weight + n64).to(tl.float32)
        labelled = labelled & (w_row != 0.0)
        misfit = misfit & (w_row != 0.0)
        mimics = mimics & (w_row != 0.0)
    return y, labelled, fits, misfit, mimics, w_y, w_row


@triton.jit
def row_start(n64, stride, low):
    """n64 * stride, as a maximum with `low`, which is negative and another number in each turn of
    the loop over classes. So the compiler cannot hoist the product out of the loop, and does not
    hold each peer's row address in registers."""
    return tl.maximum(n64 * stride, tl.cast(low, tl.int64))


@triton.jit
def load_peers(logits, n64, c, low, K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
               READABLE: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """K blocks of logits in float32, -inf past the last class. LAST: this is the last pass over the
    row, so that its cache lines may go first."""
    Z = ()
    for k in tl.static_range(K):
        at = logits[k] + (row_start(n64, STRIDES[k][0], low) + c * STRIDES[k][1])
        if LAST:
            z = tl.load(at, mask=c < READABLE[k], other=0.0, eviction_policy="evict_first")
        else:
            z = tl.load(at, mask=c < READABLE[k], other=0.0, eviction_policy="evict_last")
        Z = Z + (tl.where(c < C, z.to(tl.float32), float("-inf")),)
    return Z


# ---- sums of several peers at once


@triton.jit
def sums_of(T, FIRST: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, PEERS: tl.constexpr,
            BLOCK_C: tl.constexpr):  # fmt: skip
    """The sums of the blocks FIRST, FIRST + STEP, ... of K, (PEERS / STEP,), by one reduction."""
    COUNT: tl.constexpr = PEERS // STEP
    OF = ()
    for i in tl.static_range(COUNT):
        if FIRST + i * STEP < K:
            OF = OF + (T[FIRST + i * STEP],)
        else:
            OF = OF + (tl.zeros((BLOCK_C,), tl.float32),)
    if COUNT >= 8:
        OF = joined(OF, 4)
    if COUNT >= 4:
        OF = joined(OF, 2)
    OF = joined(OF, 1)
    return tl.sum(tl.reshape(OF[0], (BLOCK_C, COUNT)), axis=0)


@triton.jit
def peer_sums(T, K: tl.constexpr, PEERS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums of K blocks as a tensor (PEERS,). Up to 8 blocks share one reduction across the
    warps instead of having one each; more in one would need too many registers."""
    if PEERS <= 8:
        out = sums_of(T, 0, 1, K, PEERS, BLOCK_C)
    elif PEERS == 16:
        even = sums_of(T, 0, 2, K, PEERS, BLOCK_C)
        odd = sums_of(T, 1, 2, K, PEERS, BLOCK_C)
        out = tl.reshape(tl.join(even, odd), (PEERS,))
    else:
        out = tl.zeros((PEERS,), tl.float32)
        for k in tl.static_range(K):
            out = put(out, k, tl.sum(T[k], axis=0), PEERS)
    return out


# ---- first pass and what follows from it


@triton.jit
def sum_class_weights(class_weight, C: tl.constexpr, BLOCK_C: tl.constexpr, USED: tl.constexpr):
    """The sum of all class weights, which label smoothing needs (USED); C without any."""
    total = tl.cast(C, tl.float32)
    if class_weight is not None and USED:
        total = tl.cast(0.0, tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            total += tl.sum(tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32))
    return total


@triton.jit
def row_losses(logits, n64, y, labelled, fits, misfit, w_y, w_total, label_smoothing, inv_t,
               M, SUM, SUM_T, energy, spread, first, peer,
               K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr, PEERS: tl.constexpr,
               TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, STATS: tl.constexpr,
               GATE: tl.constexpr):  # fmt: skip
    """What follows from the sums of `online_sums` alone.

    LSE, LSE_T: logsumexp(z) and logsumexp(z / T). NLL: -log p of the label. CORRECT: whether the
    label is the first class of highest probability (GATE "correct"), and correct (PEERS,) the same
    (with STATS too). ce, entropy (PEERS,): the row's cross-entropy and the entropy of p (STATS,
    GATE "entropy").
    """
    LSE = ()
    LSE_T = ()
    NLL = ()
    CORRECT = ()
    correct = labelled & (first == y)
    ce = tl.zeros((PEERS,), tl.float32)
    entropy = tl.zeros((PEERS,), tl.float32)
    for k in tl.static_range(K):
        shift = tl.where(M[k] == float("-inf"), 0.0, M[k])
        lse = shift + tl.log(SUM[k])
        lse_t = lse
        if TEMPERED:
            lse_t = tl.fma(shift, inv_t, tl.log(SUM_T[k]))
        z_y = tl.load(logits[k] + n64 * STRIDES[k][0] + tl.cast(y, tl.int64) * STRIDES[k][1],
                      mask=fits, other=0.0).to(tl.float32)  # fmt: skip
        LSE = LSE + (lse,)
        LSE_T = LSE_T + (lse_t,)
        nll = tl.where(misfit, float("nan"), lse - z_y)
        NLL = NLL + (nll,)
        if STATS or GATE == "correct":
            known = tl.where(nll == nll, 1, 0)  # a peer that is NaN is never correct
            correct = correct & ((peer != k) | (known == 1))
        if GATE == "correct":
            CORRECT = CORRECT + (tl.max(tl.where((peer == k) & correct, 1, 0), axis=0) > 0,)
        else:
            CORRECT = CORRECT + (labelled,)
        ce_k = times(w_y, nll) + tl.where(misfit, float("nan"), 0.0)
        if SMOOTHED:
            towards_all = w_total * lse - spread
            ce_k = (1.0 - label_smoothing) * ce_k + label_smoothing / C * towards_all
        ce = tl.where((peer == k) & labelled, ce_k, ce)
        if STATS or GATE == "entropy":
            entropy = tl.where(peer == k, lse - energy / SUM[k], entropy)
    return LSE, LSE_T, NLL, CORRECT, correct, ce, entropy


# ---- edges: how much each peer learns from each other one


@triton.jit
def edge(k, l, peer_weights, GATES,  # noqa: E741
         K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """How much peer k learns from peer l on this row."""
    w = tl.cast(EDGE, tl.float32)
    if peer_weights is not None:
        w = tl.load(peer_weights + k * K + l).to(tl.float32)
    if GATED:
        w *= GATES[l]
    return w


@triton.jit
def store_soft_edges(edges_at, NLL, entropy, labelled, peer, peer_weights,
                     K: tl.constexpr, EDGE: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """Stores this row's edges under a soft gate as K x K numbers at `edges_at`, which then stand
    for `peer_weights`: in registers they would take one each in every thread."""
    LOG_G = ()
    for k in tl.static_range(K):
        if GATE == "confidence":
            LOG_G = LOG_G + (tl.where(labelled, -NLL[k], float("-inf")),)
        else:
            LOG_G = LOG_G + (-tl.sum(tl.where(peer == k, entropy, 0.0), axis=0),)
    GATES = soft_gates(LOG_G, peer_weights, K, EDGE)
    for k in tl.static_range(K):
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w = edge(k, l, peer_weights, (), K, EDGE, False)
                tl.store(edges_at + k * K + l, soft_edge(k, l, w, GATES, K))
    tl.debug_barrier()  # every thread sees them


@triton.jit
def edges(teacher, student, peer_weights, GATES,
          K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """`edge` of all pairs at once, in the shape of their indices; 0 where there is no pair."""
    pair = (teacher < K) & (student < K) & (teacher != student)
    w = tl.where(pair, tl.cast(EDGE, tl.float32), 0.0)
    if peer_weights is not None:
        w = tl.load(peer_weights + student * K + teacher, mask=pair, other=0.0).to(tl.float32)
    if GATED:
        for l in tl.static_range(K):  # noqa: E741
            w = tl.where(teacher == l, w * GATES[l], w)
    return w


@triton.jit
def teacher_weights(peer_weights, GATES, K: tl.constexpr, EDGE: tl.constexpr,
                    GATED: tl.constexpr):  # fmt: skip
    """For each student the sum of its teachers' weights, and what to divide by for their mean: the
    same, and 1 where nobody teaches."""
    WEIGHT = ()
    DIVISOR = ()
    for k in tl.static_range(K):
        w_sum = tl.cast(0.0, tl.float32)
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w_sum += edge(k, l, peer_weights, GATES, K, EDGE, GATED)
        WEIGHT = WEIGHT + (w_sum,)
        DIVISOR = DIVISOR + (tl.where(w_sum != 0.0, w_sum, 1.0),)
    return WEIGHT, DIVISOR


# ---- divergences


@triton.jit
def log_probabilities(Z, LSE_T, inv_t, K: tl.constexpr, TEMPERED: tl.constexpr):
    """top = max_l log q_l, then d_l = log q_l - top (0 for identical peers, exactly), and q_l."""
    top = log_probability(Z[0], inv_t, LSE_T[0], TEMPERED)
    for k in tl.static_range(1, K):
        top = tl.maximum(top, log_probability(Z[k], inv_t, LSE_T[k], TEMPERED))
    top = tl.where(top == float("-inf"), 0.0, top)
    D = ()
    Q = ()
    for k in tl.static_range(K):
        log_q = log_probability(Z[k], inv_t, LSE_T[k], TEMPERED)
        D = D + (log_q - top,)
        Q = Q + (tl.exp(log_q),)
    return top, D, Q


@triton.jit
def mean_probability(k: tl.constexpr, D, peer_weights, GATES, divisor,
                     K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                     FAR: tl.constexpr):  # fmt: skip
    """log t - top of student k's teacher under target "ensemble": t is the weighted mean of the
    other peers' q. FAR: also where all of them are less than 2**-126 of the student's; else -inf
    there."""
    highest = tl.zeros_like(D[0])  # of the teachers
    if FAR:
        highest += float("-inf")
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w = edge(k, l, peer_weights, GATES, K, EDGE, GATED)
                highest = tl.maximum(highest, tl.where(w != 0.0, D[l], float("-inf")))
        highest = tl.where(highest == float("-inf"), 0.0, highest)
    mixed = tl.zeros_like(D[0])
    for l in tl.static_range(K):  # noqa: E741
        if l != k:
            w = edge(k, l, peer_weights, GATES, K, EDGE, GATED)
            mixed += times(w, tl.exp(D[l] - highest))
    gap = log_mean(mixed, divisor)
    if FAR:
        gap += highest
    return gap


@triton.jit
def pairs_of_sums(cross, SUM, SUM_T, LSE_T, teacher, student, is_pair,
                  K: tl.constexpr, PEERS: tl.constexpr, TEMPERED: tl.constexpr):  # fmt: skip
    """KL(q_l || q_k) at [l, k] from the sums of the first pass: cross / sum_l + lse_k - lse_l."""
    of_teacher = tl.zeros((PEERS, PEERS), tl.float32)
    of_student = tl.zeros((PEERS, PEERS), tl.float32)
    total = tl.full((PEERS, PEERS), 1.0, tl.float32)
    for k in tl.static_range(K):
        of_teacher = tl.where(teacher == k, LSE_T[k], of_teacher)
        of_student = tl.where(student == k, LSE_T[k], of_student)
        if TEMPERED:
            total = tl.where(teacher == k, SUM_T[k], total)
        else:
            total = tl.where(teacher == k, SUM[k], total)
    pairs = cross / total + (of_student - of_teacher)
    return tl.where(is_pair & (teacher != student), pairs, 0.0)


@triton.jit
def reverse_of_sums(GAP, SUM, SUM_T, LSE_T, peer_weights, inv_t,
                    K: tl.constexpr, EDGE: tl.constexpr, TEMPERED: tl.constexpr):  # fmt: skip
    """Each student's sum of w_kl KL(q_k || q_l) over its teachers l, from the sums of the first
    pass: GAP / sum_k plus the weighted lse_l - lse_k."""
    OUT = ()
    for k in tl.static_range(K):
        if TEMPERED:
            value = GAP[k] * inv_t / SUM_T[k]
        else:
            value = GAP[k] / SUM[k]
        if peer_weights is None:
            for l in tl.static_range(K):  # noqa: E741
                value += LSE_T[l] - LSE_T[k]
            value *= EDGE
        else:
            for l in tl.static_range(K):  # noqa: E741
                if l != k:
                    w = edge(k, l, peer_weights, (), K, EDGE, False)
                    value += times(w, LSE_T[l] - LSE_T[k])
        OUT = OUT + (value,)
    return OUT


@triton.jit
def add_block_to_pairs(pairs, D, Q, teacher, K: tl.constexpr, PEERS: tl.constexpr,
                       BLOCK_C: tl.constexpr):  # fmt: skip
    """Adds a block's share of KL(q_l || q_k) at [l, k]."""
    for l in tl.static_range(K):  # noqa: E741
        PARTS = ()
        for k in tl.static_range(K):
            if l != k:
                PARTS = PARTS + (times(Q[l], D[l] - D[k]),)
            else:
                PARTS = PARTS + (tl.zeros((BLOCK_C,), tl.float32),)
        part = peer_sums(PARTS, K, PEERS, BLOCK_C)[None, :]
        pairs += tl.where(teacher == l, part, 0.0)
    return pairs


@triton.jit
def kl_of_pairs(pairs, peer_weights, GATES, K: tl.constexpr, EDGE: tl.constexpr,
                GATED: tl.constexpr, DIVERGENCE: tl.constexpr, PEERS: tl.constexpr):  # fmt: skip
    """Each student's KL term, (PEERS,), from KL(q_l || q_k) at [l, k]."""
    row = tl.arange(0, PEERS)[:, None]
    column = tl.arange(0, PEERS)[None, :]
    kl = tl.zeros((PEERS,), tl.float32)
    away = kl
    if DIVERGENCE != "reverse":
        w = edges(row, column, peer_weights, GATES, K, EDGE, GATED)
        kl = tl.sum(times(w, pairs), axis=0)
    if DIVERGENCE != "forward":
        w = edges(column, row, peer_weights, GATES, K, EDGE, GATED)
        away = away + tl.sum(times(w, pairs), axis=1)
    return divergence_of(kl, away, DIVERGENCE, 0.5)


# ---- second pass


@triton.jit
def ensemble_argmax(Z, LSE, c, highest, best, K: tl.constexpr, C: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    """The highest sum of the peers' p so far, and its class, after one more block. The pass walks
    backwards, so that an equal sum is of an earlier class and replaces the one before: ties go to
    the first class."""
    p_sum = tl.zeros((BLOCK_C,), tl.float32)
    for k in tl.static_range(K):
        p_sum += tl.exp(Z[k] - LSE[k])
    p_sum = tl.where(c < C, p_sum, -1.0)
    here = tl.max(p_sum, axis=0)
    at = tl.min(tl.where(p_sum == here, c, C), axis=0)
    best = tl.where(here >= highest, at, best)
    return tl.maximum(highest, here), best


@triton.jit
def load_upstream(upstream, u_stride_k, u_stride_n, n64, K: tl.constexpr):
    """The upstream gradients of the row's K losses, each 1 without `upstream`."""
    UP = ()
    for k in tl.static_range(K):
        up = tl.cast(1.0, tl.float32)
        if upstream is not None:
            up = tl.load(upstream + k * u_stride_k + n64 * u_stride_n).to(tl.float32)
        UP = UP + (up,)
    return UP


@triton.jit
def ce_gradient(p, w_c, c, y, labelled, w_y, w_total, label_smoothing, ce_row, up,
                C: tl.constexpr, SMOOTHED: tl.constexpr):  # fmt: skip
    """A block of the cross-entropy's gradient, times ce_row and up; 0 without a label, whatever
    these are."""
    g = w_y * (p - tl.where(c == y, 1.0, 0.0))
    if SMOOTHED:
        g = ((1.0 - label_smoothing) * g
             + label_smoothing / C * (w_total * p - w_c))  # fmt: skip
    return tl.where(labelled, ce_row * up * g, 0.0)


# ---- a program's sums, in the places of the statistics in LAYOUT, a `StatsLayout`


@triton.jit
def store_early_sums(partials, peer, ce_sums, ce, entropy_sums, entropy, correct_sums, correct,
                     mimics, w_row, K: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """Stores the sums that are known before the second pass, with this row.

    `store_sums` stores them too. Storing them here makes the compiler compute them here; later, the
    values that they are computed from would stay in registers through the second pass."""
    sums = partials + tl.program_id(0) * LAYOUT.size
    tl.store(sums + LAYOUT.ce + peer, ce_sums + ce, mask=peer < K)
    tl.store(sums + LAYOUT.entropy + peer, entropy_sums + tl.where(mimics, entropy, 0.0) * w_row,
             mask=peer < K)  # fmt: skip
    tl.store(sums + LAYOUT.correct + peer, correct_sums + tl.where(correct, w_row, 0.0),
             mask=peer < K)  # fmt: skip


@triton.jit
def store_sums(partials, peer, is_pair, pair_at, ce, kl, ce_count, labelled_rows, entropy, correct,
               ensemble_correct, pairs, all_rows,
               K: tl.constexpr, LAYOUT: tl.constexpr, STATS: tl.constexpr,
               COUNT_ALL: tl.constexpr):  # fmt: skip
    """Stores all of a program's sums. all_rows, the weight of all its rows, has the place of the
    pair of the first peer with itself, which is 0 else (COUNT_ALL)."""
    sums = partials + tl.program_id(0) * LAYOUT.size
    is_peer = peer < K
    tl.store(sums + LAYOUT.ce + peer, ce, mask=is_peer)
    tl.store(sums + LAYOUT.kl + peer, kl, mask=is_peer)
    tl.store(sums + LAYOUT.label_weight, ce_count)
    tl.store(sums + LAYOUT.labelled, labelled_rows)
    if STATS:
        if COUNT_ALL:
            pairs = tl.where(pair_at == 0, all_rows, pairs)
        tl.store(sums + LAYOUT.entropy + peer, entropy, mask=is_peer)
        tl.store(sums + LAYOUT.correct + peer, correct, mask=is_peer)
        tl.store(sums + LAYOUT.ensemble_correct, ensemble_correct)
        tl.store(sums + LAYOUT.pairwise_kl + pair_at, pairs, mask=is_pair)
    elif COUNT_ALL:
        tl.store(sums + LAYOUT.pairwise_kl, all_rows)
