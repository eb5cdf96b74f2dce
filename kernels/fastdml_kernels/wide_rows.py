"""Loss, statistics and gradient for rows of any length and for every option, a block of classes at
a time.

A program takes one sample. Its first pass over the K rows is online: running maximum and running
sums, rescaled as the maximum grows. Without a gradient that pass is all the plain loss needs: one
read. With one, a second pass walks the row backwards, so that it begins with what the cache still
holds, and writes each gradient once: two reads, one write.

More passes, and why:
- target="ensemble" without gradient, or statistics without gradient: a second read, since a mean
  of probabilities needs every peer's normaliser first.
- target="ensemble_logits": one more, for the normaliser of the mixed logits, which depends on who
  teaches on the row.
- a mixed target with symmetric=True or detach_targets=False, with gradient: one more, since the
  gradient holds the divergences themselves.

Pair terms are O(K**2 C) here: with one read nothing is normalised yet, and each ordered pair needs
its own running sum. They are kept in one tensor, spread over the program's threads.

Notation as in `register_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    averaged,
    finish,
    log_probability,
    loss_weights,
    open_gates,
    put,
    times,
)


@triton.jit
def row_start(n64, stride, low):
    """n64 * stride. `low`, negative and another in every turn of the loop over classes, keeps the
    compiler from holding each peer's row address in registers through it."""
    return tl.maximum(n64 * stride, tl.cast(low, tl.int64))


@triton.jit
def load_peers(logits, n64, c, low, K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr,
               READABLE: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """K blocks of logits, float32, -inf past the last class."""
    Z = ()
    for k in tl.static_range(K):
        at = logits[k] + (row_start(n64, STRIDES[k][0], low) + c * STRIDES[k][1])
        if LAST:  # not needed again: leave the cache to what is
            z = tl.load(at, mask=c < READABLE[k], other=0.0, eviction_policy="evict_first")
        else:
            z = tl.load(at, mask=c < READABLE[k], other=0.0, eviction_policy="evict_last")
        Z = Z + (tl.where(c < C, z.to(tl.float32), float("-inf")),)
    return Z


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
def mixed_logits(k: tl.constexpr, Z, peer_weights, GATES, w_sum, inv_t,
                 K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Mean of the other peers' logits over T, from differences to the first of them: identical
    peers mix to themselves, exactly."""
    base = Z[(0 if k else 1)]
    for back in tl.static_range(K):  # the first of them that teaches: the others count for nothing
        if K - 1 - back != k:
            w = edge(k, K - 1 - back, peer_weights, GATES, K, EDGE, GATED)
            base = tl.where(w != 0.0, Z[K - 1 - back], base)
    low = base
    mixed = tl.zeros_like(base)
    for l in tl.static_range(K):  # noqa: E741
        if l != k:
            w = edge(k, l, peer_weights, GATES, K, EDGE, GATED) / w_sum
            low = tl.where(w != 0.0, tl.minimum(low, Z[l]), low)
            mixed += times(w, tl.where(Z[l] == base, 0.0, Z[l] - base))
    return tl.where(low == float("-inf"), low, base + mixed) * inv_t


@triton.jit
def mixed_teacher(k: tl.constexpr, Z, D, top, peer_weights, GATES, w_sum, mix_lse, inv_t,
                  K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                  TARGET: tl.constexpr):  # fmt: skip
    """log t - max_l log q_l of peer k's mixed teacher t, and t itself."""
    if TARGET == "ensemble":
        mixed = tl.zeros_like(top)
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                mixed += times(edge(k, l, peer_weights, GATES, K, EDGE, GATED), tl.exp(D[l]))
        gap = tl.log(mixed / w_sum)
    else:
        log_t = mixed_logits(k, Z, peer_weights, GATES, w_sum, inv_t, K, EDGE, GATED) - mix_lse
        gap = log_t - top
    return gap, tl.exp(gap + top)


@triton.jit
def log_probabilities(Z, LSE_T, inv_t, K: tl.constexpr, TEMPERED: tl.constexpr):
    """max_l log q_l, then d_l = log q_l - max (0 for identical peers, exactly), and q_l."""
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
def kl_terms(Z, D, Q, top, W_SUM, MIX_LSE, peer_weights, GATES, inv_t,
             K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr, UNIFORM: tl.constexpr,
             TARGET: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """One block's share of each student's KL term, weights included. The symmetric divergence of
    single peers comes from `kl_of_pairs`."""
    OUT = ()
    if UNIFORM and TARGET == "peers":
        mass = Q[0]
        energy = times(Q[0], D[0])
        for k in tl.static_range(1, K):
            mass += Q[k]
            energy += times(Q[k], D[k])
        for k in tl.static_range(K):
            OUT = OUT + (tl.sum(energy - times(mass, D[k]), axis=0) * EDGE,)
    else:
        for k in tl.static_range(K):
            total = tl.cast(0.0, tl.float32)
            if TARGET == "peers":
                for l in tl.static_range(K):  # noqa: E741
                    if l != k:
                        w = edge(k, l, peer_weights, GATES, K, EDGE, GATED)
                        total += times(w, tl.sum(times(Q[l], D[l] - D[k]), axis=0))
            else:
                gap, t = mixed_teacher(k, Z, D, top, peer_weights, GATES, W_SUM[k], MIX_LSE[k],
                                       inv_t, K, EDGE, GATED, TARGET)  # fmt: skip
                pair = times(t, gap - D[k])
                if SYMMETRIC:
                    pair = 0.5 * (pair + times(Q[k], D[k] - gap))
                total = tl.sum(pair, axis=0)
            OUT = OUT + (total,)
    return OUT


@triton.jit
def joined(T, HALF: tl.constexpr):
    """2 * HALF tensors, each of the first half beside one of the second."""
    OUT = ()
    for k in tl.static_range(HALF):
        OUT = OUT + (tl.join(T[k], T[k + HALF]),)
    return OUT


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
    """The sums of K blocks in the places of a tensor (PEERS,): up to 8 by one reduction instead
    of one each, which more would need too many registers for."""
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
def kl_of_pairs(pairs, peer_weights, GATES, K: tl.constexpr, EDGE: tl.constexpr,
                GATED: tl.constexpr, SYMMETRIC: tl.constexpr, PEERS: tl.constexpr):  # fmt: skip
    """Each student's KL term, (PEERS,), from KL(q_l || q_k) at [l, k]."""
    row = tl.arange(0, PEERS)[:, None]
    column = tl.arange(0, PEERS)[None, :]
    kl = tl.sum(times(edges(row, column, peer_weights, GATES, K, EDGE, GATED), pairs), axis=0)
    if SYMMETRIC:
        away = times(edges(column, row, peer_weights, GATES, K, EDGE, GATED), pairs)
        kl = 0.5 * (kl + tl.sum(away, axis=1))
    return kl


@triton.jit(do_not_specialize=["N", "ignore_index", "label_stride", "u_stride_k", "u_stride_n"])
def wide_rows(
    logits,  # K pointers (N, C)
    grads,  # K pointers (N, C), or () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K), or None
    class_weight,  # (C,), or None
    upstream,  # the losses' own gradient, (K,) or (K, N) by its strides, or None for 1
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # packed statistics, float32
    partials,  # (programs, their size) float32
    scratch,  # (programs, 3 K K) float32: one row's pair terms
    counter,  # (1,) int32, zero before and after
    counts,  # (2,) float32: label counts taken by an earlier launch, or None
    N, label_stride, ignore_index, u_stride_k, u_stride_n,
    ce_weight, kl_weight, temperature, label_smoothing,
    K: tl.constexpr, C: tl.constexpr,
    STRIDES: tl.constexpr,  # per peer: logits row, logits column, gradient row
    READABLE: tl.constexpr,  # per peer: columns that may be read, C or more
    BLOCK_C: tl.constexpr, PEERS: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,  # a StatsLayout: of the statistics, and of a program's sums
    NEED_GRAD: tl.constexpr, STATS: tl.constexpr, REDUCTION: tl.constexpr,
    TARGET: tl.constexpr, GATE: tl.constexpr, EDGE: tl.constexpr,
    SYMMETRIC: tl.constexpr, DETACH: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes samples b, b + programs, ..."""
    GATED: tl.constexpr = GATE != "none"
    UNIFORM: tl.constexpr = (peer_weights is None) and (not GATED)
    HAS_CLASS_WEIGHT: tl.constexpr = class_weight is not None
    MUTUAL: tl.constexpr = K > 1
    MIXED: tl.constexpr = MUTUAL and TARGET != "peers"
    # The gradient then holds the divergences themselves, and they must be known before it.
    COUPLED: tl.constexpr = MUTUAL and NEED_GRAD and (SYMMETRIC or not DETACH)
    SECOND: tl.constexpr = NEED_GRAD or STATS or MIXED
    ONLINE_PAIRS: tl.constexpr = MUTUAL and TARGET == "peers" and (COUPLED or not SECOND)
    FROM_PAIRS: tl.constexpr = ONLINE_PAIRS or (MUTUAL and TARGET == "peers" and STATS)
    VALUES_PASS: tl.constexpr = MIXED and COUPLED
    HALF: tl.constexpr = 0.5 if SYMMETRIC else 1.0
    LAST_BLOCK: tl.constexpr = (C - 1) // BLOCK_C * BLOCK_C

    ce_weight, kl_weight, inv_t, kl_scale = loss_weights(
        ce_weight, kl_weight, temperature, CE_POINTER, KL_POINTER, T_POINTER, TEMPERED
    )
    ce_factor = ce_weight  # what one row's gradient is multiplied by
    kl_factor = kl_weight * kl_scale * inv_t
    if NEED_GRAD and REDUCTION == "mean":
        ce_factor, kl_factor = averaged(
            ce_factor, kl_factor, counts, labels, label_stride, class_weight, N, ignore_index,
            HAS_CLASS_WEIGHT, MIMIC_IGNORED, C,
        )  # fmt: skip

    w_total = tl.cast(C, tl.float32)
    if HAS_CLASS_WEIGHT and SMOOTHED:
        w_total = tl.cast(0.0, tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            w_total += tl.sum(tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32))

    # One number a peer, or a pair, spread over the threads: K of them in every thread would spill.
    peer_at = tl.arange(0, PEERS)
    teacher = peer_at[:, None]
    student = peer_at[None, :]
    is_pair = (teacher < K) & (student < K)
    pair_at = teacher * K + student
    ce_sums = tl.zeros((PEERS,), tl.float32)
    kl_sums = tl.zeros((PEERS,), tl.float32)
    entropy_sums = tl.zeros((PEERS,), tl.float32)
    right_sums = tl.zeros((PEERS,), tl.float32)
    pair_sums = tl.zeros((PEERS, PEERS), tl.float32)
    ce_count = tl.cast(0.0, tl.float32)
    labelled_rows = tl.cast(0.0, tl.float32)
    together_right = tl.cast(0.0, tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        n64 = tl.cast(n, tl.int64)
        y = tl.load(labels + n64 * label_stride)
        labelled = y != ignore_index
        fits = (y >= 0) & (y < C)
        # A label outside 0..C-1 is never used as an index; its row turns NaN, to be seen.
        misfit = labelled & (fits == 0)
        mimics = labelled
        if MIMIC_IGNORED:
            mimics = y == y
        w_y = tl.where(labelled, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            w_y = tl.load(class_weight + y, mask=labelled & fits, other=0.0).to(tl.float32)

        # ---- first pass: normalisers, and with ONLINE_PAIRS sums of e_l (z_l - z_k) / T
        M = ()
        SUM = ()
        SUM_T = ()
        energy = tl.zeros((PEERS,), tl.float32)  # sum e z, for the entropy
        spread = tl.zeros((PEERS,), tl.float32)  # sum w_c z, for label smoothing
        first = tl.zeros((PEERS,), tl.int32)  # first class that reaches the maximum
        for k in tl.static_range(K):
            M = M + (tl.cast(float("-inf"), tl.float32),)
            SUM = SUM + (tl.cast(0.0, tl.float32),)
            SUM_T = SUM_T + (tl.cast(0.0, tl.float32),)
        cross = tl.zeros((PEERS, PEERS), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, not SECOND)
            if SMOOTHED:
                w_c = tl.where(c < C, 1.0, 0.0)
                if HAS_CLASS_WEIGHT:
                    w_c = tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32)
            NM = ()
            NSUM = ()
            NSUM_T = ()
            for k in tl.static_range(K):
                z = Z[k]
                here = tl.max(z, axis=0)
                m = tl.maximum(M[k], here)
                shift = tl.where(m == float("-inf"), 0.0, m)
                e = tl.exp(z - shift)
                shrink = tl.exp(M[k] - shift)
                NM = NM + (m,)
                NSUM = NSUM + (SUM[k] * shrink + tl.sum(e, axis=0),)
                e_t = e
                shrink_t = shrink
                if TEMPERED:
                    e_t = tl.exp((z - shift) * inv_t)
                    shrink_t = tl.exp((M[k] - shift) * inv_t)
                    NSUM_T = NSUM_T + (SUM_T[k] * shrink_t + tl.sum(e_t, axis=0),)
                else:
                    NSUM_T = NSUM_T + (SUM_T[k],)
                if STATS:
                    grown = energy * shrink + tl.sum(times(e, z), axis=0)
                    energy = tl.where(peer_at == k, grown, energy)
                if SMOOTHED:
                    weighted = tl.where(c < C, times(w_c, z), 0.0)
                    spread = put(spread, k, tl.sum(weighted, axis=0), PEERS)
                if STATS or GATE == "correct":
                    at = tl.min(tl.where(z == here, c, C), axis=0)
                    at = tl.where(here > M[k], at, first)
                    first = tl.where(peer_at == k, at, first)
                if ONLINE_PAIRS:
                    GAPS = ()
                    for j in tl.static_range(K):
                        if j != k:
                            GAPS = GAPS + (times(e_t, (z - Z[j]) * inv_t),)
                        else:
                            GAPS = GAPS + (tl.zeros((BLOCK_C,), tl.float32),)
                    grown = times(shrink_t, cross) + peer_sums(GAPS, K, PEERS, BLOCK_C)[None, :]
                    cross = tl.where(teacher == k, grown, cross)
            M = NM
            SUM = NSUM
            SUM_T = NSUM_T

        LSE = ()
        LSE_T = ()
        NLL = ()
        RIGHT = ()
        right = labelled & (first == y)
        ce = tl.zeros((PEERS,), tl.float32)
        entropy = tl.zeros((PEERS,), tl.float32)
        for k in tl.static_range(K):
            shift = tl.where(M[k] == float("-inf"), 0.0, M[k])
            lse = shift + tl.log(SUM[k])
            lse_t = lse
            if TEMPERED:
                lse_t = shift * inv_t + tl.log(SUM_T[k])
            z_y = tl.load(logits[k] + n64 * STRIDES[k][0] + tl.cast(y, tl.int64) * STRIDES[k][1],
                          mask=fits, other=0.0).to(tl.float32)  # fmt: skip
            LSE = LSE + (lse,)
            LSE_T = LSE_T + (lse_t,)
            nll = tl.where(misfit, float("nan"), lse - z_y)
            NLL = NLL + (nll,)
            if STATS or GATE == "correct":
                known = tl.where(nll == nll, 1, 0)  # a peer that is NaN is never right
                right = right & ((peer_at != k) | (known == 1))
            if GATE == "correct":
                RIGHT = RIGHT + (tl.max(tl.where((peer_at == k) & right, 1, 0), axis=0) > 0,)
            else:
                RIGHT = RIGHT + (labelled,)
            own = times(w_y, nll) + tl.where(misfit, float("nan"), 0.0)
            if SMOOTHED:
                towards_all = w_total * lse - spread
                own = (1.0 - label_smoothing) * own + label_smoothing / C * towards_all
            ce = tl.where((peer_at == k) & labelled, own, ce)
            if STATS:
                entropy = tl.where(peer_at == k, lse - energy / SUM[k], entropy)

        if STATS and NEED_GRAD:
            # The sums with this row, as they are added up below. Storing them has them computed
            # here: put off, all they are made of would stay in registers through the second pass.
            sums = partials + tl.program_id(0) * LAYOUT.size
            tl.store(sums + LAYOUT.ce + peer_at, ce_sums + ce, mask=peer_at < K)
            tl.store(sums + LAYOUT.entropy + peer_at,
                     entropy_sums + tl.where(mimics, entropy, 0.0), mask=peer_at < K)  # fmt: skip
            tl.store(sums + LAYOUT.correct + peer_at, right_sums + tl.where(right, 1.0, 0.0),
                     mask=peer_at < K)  # fmt: skip

        # ---- who teaches on this row
        GATES = ()
        if GATE != "none":
            GATES = open_gates(RIGHT, NLL, labelled, GATE, K)
        W_SUM = ()  # weight of each student's mixed teacher; 1 where it has none
        TAUGHT = ()
        MIX_LSE = ()
        for k in tl.static_range(K):
            w_sum = tl.cast(0.0, tl.float32)
            if MIXED:
                for l in tl.static_range(K):  # noqa: E741
                    if l != k:
                        w_sum += edge(k, l, peer_weights, GATES, K, EDGE, GATED)
            TAUGHT = TAUGHT + (w_sum,)
            W_SUM = W_SUM + (tl.where(w_sum != 0.0, w_sum, 1.0),)
            MIX_LSE = MIX_LSE + (tl.cast(0.0, tl.float32),)
        if MIXED and TARGET == "ensemble_logits":
            MIX_M = ()
            MIX_SUM = ()
            for k in tl.static_range(K):
                MIX_M = MIX_M + (tl.cast(float("-inf"), tl.float32),)
                MIX_SUM = MIX_SUM + (tl.cast(0.0, tl.float32),)
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, False)
                NM = ()
                NSUM = ()
                for k in tl.static_range(K):
                    z = mixed_logits(k, Z, peer_weights, GATES, W_SUM[k], inv_t, K, EDGE, GATED)
                    m = tl.maximum(MIX_M[k], tl.max(z, axis=0))
                    shift = tl.where(m == float("-inf"), 0.0, m)
                    total = MIX_SUM[k] * tl.exp(MIX_M[k] - shift)
                    total += tl.sum(tl.exp(z - shift), axis=0)
                    NM = NM + (m,)
                    NSUM = NSUM + (total,)
                MIX_M = NM
                MIX_SUM = NSUM
            MIX_LSE = ()
            for k in tl.static_range(K):
                shift = tl.where(MIX_M[k] == float("-inf"), 0.0, MIX_M[k])
                MIX_LSE = MIX_LSE + (shift + tl.log(MIX_SUM[k]),)

        # ---- divergences
        pairs = tl.zeros((PEERS, PEERS), tl.float32)  # KL(q_l || q_k) at [l, k]
        KL = ()
        for k in tl.static_range(K):
            KL = KL + (tl.cast(0.0, tl.float32),)
        if ONLINE_PAIRS:
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
            pairs = tl.where(is_pair & (teacher != student), pairs, 0.0)
        FORWARD = ()  # sum_c t (log t - log q_k) of a mixed teacher, and the way back
        BACK = ()
        mine = scratch + tl.program_id(0) * (3 * K * K)
        if VALUES_PASS:
            for k in tl.static_range(K):
                FORWARD = FORWARD + (tl.cast(0.0, tl.float32),)
                BACK = BACK + (tl.cast(0.0, tl.float32),)
            toward = tl.zeros((PEERS, PEERS), tl.float32)  # sum_c q_l (log t_k - log q_k), [l, k]
            ratios = tl.zeros((PEERS, PEERS), tl.float32)  # sum_c q_l q_k / t_k
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, False)
                top, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
                NFORWARD = ()
                NBACK = ()
                for k in tl.static_range(K):
                    gap, t = mixed_teacher(k, Z, D, top, peer_weights, GATES, W_SUM[k],
                                           MIX_LSE[k], inv_t, K, EDGE, GATED, TARGET)  # fmt: skip
                    NFORWARD = NFORWARD + (FORWARD[k] + tl.sum(times(t, gap - D[k]), axis=0),)
                    NBACK = NBACK + (BACK[k] + tl.sum(times(Q[k], D[k] - gap), axis=0),)
                    if TARGET == "ensemble" and not DETACH:
                        for l in tl.static_range(K):  # noqa: E741
                            if l != k:
                                at = (teacher == l) & (student == k)
                                part = tl.sum(times(Q[l], gap - D[k]), axis=0)
                                toward += tl.where(at, part, 0.0)
                                if SYMMETRIC:
                                    ratio = tl.where(t == 0.0, 0.0, Q[l] * Q[k] / t)
                                    ratios += tl.where(at, tl.sum(ratio, axis=0), 0.0)
                FORWARD = NFORWARD
                BACK = NBACK
            KL = ()
            for k in tl.static_range(K):
                total = FORWARD[k]
                if SYMMETRIC:
                    total = 0.5 * (total + BACK[k])
                KL = KL + (times(TAUGHT[k], total),)
            if TARGET == "ensemble" and not DETACH:
                tl.store(mine + K * K + pair_at, toward, mask=is_pair)
                tl.store(mine + 2 * K * K + pair_at, ratios, mask=is_pair)
        if COUPLED and not MIXED:
            tl.store(mine + pair_at, pairs, mask=is_pair)
        if COUPLED:
            tl.debug_barrier()

        # ---- second pass, backwards: gradients, and what needs every normaliser
        highest = tl.cast(-1.0, tl.float32)
        together = tl.cast(0, tl.int32)
        if SECOND:
            if NEED_GRAD:
                ce_row = tl.where(labelled, ce_factor, 0.0)
                kl_row = tl.where(mimics, kl_factor, 0.0)
                # a term left out is selected, not multiplied
                has_kl = mimics & (tl.where(kl_factor != 0.0, 1, 0) == 1)
                bad = tl.where(misfit, float("nan"), 0.0)
                UP = ()
                for k in tl.static_range(K):
                    up = tl.cast(1.0, tl.float32)
                    if upstream is not None:
                        up = tl.load(upstream + k * u_stride_k + n64 * u_stride_n).to(tl.float32)
                    UP = UP + (up,)
            for back in range(0, C, BLOCK_C):
                c = LAST_BLOCK - back + tl.arange(0, BLOCK_C)
                Z = load_peers(logits, n64, c, -BLOCK_C - back, K, C, STRIDES, READABLE, True)
                if MUTUAL:
                    top, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
                    if not FROM_PAIRS and not VALUES_PASS:
                        PART = kl_terms(Z, D, Q, top, W_SUM, MIX_LSE, peer_weights, GATES, inv_t,
                                        K, EDGE, GATED, UNIFORM, TARGET, SYMMETRIC)  # fmt: skip
                        NKL = ()
                        for k in tl.static_range(K):
                            if MIXED:
                                NKL = NKL + (KL[k] + times(TAUGHT[k], PART[k]),)
                            else:
                                NKL = NKL + (KL[k] + PART[k],)
                        KL = NKL
                    if STATS and not ONLINE_PAIRS:
                        for l in tl.static_range(K):  # noqa: E741
                            PARTS = ()
                            for k in tl.static_range(K):
                                if l != k:
                                    PARTS = PARTS + (times(Q[l], D[l] - D[k]),)
                                else:
                                    PARTS = PARTS + (tl.zeros((BLOCK_C,), tl.float32),)
                            part = peer_sums(PARTS, K, PEERS, BLOCK_C)[None, :]
                            pairs += tl.where(teacher == l, part, 0.0)
                if STATS:
                    p_sum = tl.zeros((BLOCK_C,), tl.float32)
                    for k in tl.static_range(K):
                        p_sum += tl.exp(Z[k] - LSE[k])
                    p_sum = tl.where(c < C, p_sum, -1.0)
                    here = tl.max(p_sum, axis=0)
                    at = tl.min(tl.where(p_sum == here, c, C), axis=0)
                    # walking backwards, an equal maximum is an earlier class: ties go to the first
                    together = tl.where(here >= highest, at, together)
                    highest = tl.maximum(highest, here)
                if NEED_GRAD:
                    w_c = tl.where(c < C, 1.0, 0.0)
                    if HAS_CLASS_WEIGHT and SMOOTHED:
                        w_c = tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32)
                    if MUTUAL and UNIFORM and not COUPLED:
                        # q_k - mean of the others, from differences to the first peer
                        away = tl.zeros((BLOCK_C,), tl.float32)
                        for k in tl.static_range(1, K):
                            away += Q[k] - Q[0]
                    for j in tl.static_range(K):
                        if MUTUAL and not TEMPERED:
                            p = Q[j]
                        else:
                            p = tl.exp(Z[j] - LSE[j])
                        g = w_y * (p - tl.where(c == y, 1.0, 0.0))
                        if SMOOTHED:
                            g = ((1.0 - label_smoothing) * g
                                 + label_smoothing / C * (w_total * p - w_c))  # fmt: skip
                        g = tl.where(labelled, ce_row * UP[j] * g, 0.0)
                        if MUTUAL and not COUPLED:
                            if UNIFORM and TARGET != "ensemble_logits":
                                pull = (K * (Q[j] - Q[0]) - away) * EDGE
                            elif TARGET == "ensemble_logits":
                                gap, t = mixed_teacher(j, Z, D, top, peer_weights, GATES, W_SUM[j],
                                                       MIX_LSE[j], inv_t, K, EDGE, GATED,
                                                       TARGET)  # fmt: skip
                                pull = times(TAUGHT[j], Q[j] - t)
                            else:
                                pull = tl.zeros((BLOCK_C,), tl.float32)
                                for l in tl.static_range(K):  # noqa: E741
                                    if l != j:
                                        w = edge(j, l, peer_weights, GATES, K, EDGE, GATED)
                                        pull += times(w, Q[j] - Q[l])
                            g += tl.where(has_kl, kl_row * UP[j] * pull, 0.0)
                        if COUPLED:
                            pull = tl.zeros((BLOCK_C,), tl.float32)
                            if MIXED:
                                gap, t = mixed_teacher(j, Z, D, top, peer_weights, GATES, W_SUM[j],
                                                       MIX_LSE[j], inv_t, K, EDGE, GATED,
                                                       TARGET)  # fmt: skip
                                slope = Q[j] - t
                                if SYMMETRIC:
                                    slope += times(Q[j], D[j] - gap) - times(Q[j], BACK[j])
                                pull += times(HALF * UP[j] * TAUGHT[j], slope)
                            for o in tl.static_range(K):
                                if o != j:
                                    if not MIXED:
                                        # learning from o ...
                                        w = edge(j, o, peer_weights, GATES, K, EDGE, GATED)
                                        slope = Q[j] - Q[o]
                                        if SYMMETRIC:
                                            own = tl.load(mine + j * K + o)
                                            slope += times(Q[j], D[j] - D[o]) - times(Q[j], own)
                                        pull += times(HALF * UP[j] * w, slope)
                                    if not DETACH:
                                        # ... and teaching o
                                        w = edge(o, j, peer_weights, GATES, K, EDGE, GATED)
                                        if TARGET == "peers":
                                            own = tl.load(mine + j * K + o)
                                            slope = times(Q[j], D[j] - D[o]) - times(Q[j], own)
                                            if SYMMETRIC:
                                                slope += Q[j] - Q[o]
                                        else:
                                            gap, t = mixed_teacher(
                                                o, Z, D, top, peer_weights, GATES, W_SUM[o],
                                                MIX_LSE[o], inv_t, K, EDGE, GATED, TARGET,
                                            )  # fmt: skip
                                            if TARGET == "ensemble":
                                                own = tl.load(mine + K * K + j * K + o)
                                                slope = (times(Q[j], gap - D[o])
                                                         - times(Q[j], own))  # fmt: skip
                                                if SYMMETRIC:
                                                    own = tl.load(mine + 2 * K * K + j * K + o)
                                                    ratio = tl.where(t == 0.0, 0.0,
                                                                     Q[j] * Q[o] / t)  # fmt: skip
                                                    slope += times(Q[j], own) - ratio
                                            else:
                                                slope = (times(t, gap - D[o])
                                                         - times(t, FORWARD[o]))  # fmt: skip
                                                if SYMMETRIC:
                                                    slope += t - Q[o]
                                        pull += times(HALF * UP[o] * w, slope)
                            g += tl.where(has_kl, kl_row * pull, 0.0)
                        g += bad
                        tl.store(grads[j] + (row_start(n64, STRIDES[j][2], -BLOCK_C - back) + c),
                                 g.to(grads[j].dtype.element_ty), mask=c < C,
                                 eviction_policy="evict_first")  # fmt: skip

        # ---- this row's part of the sums
        kl = tl.zeros((PEERS,), tl.float32)
        if FROM_PAIRS:
            kl = kl_of_pairs(pairs, peer_weights, GATES, K, EDGE, GATED, SYMMETRIC, PEERS)
        else:
            for k in tl.static_range(K):
                kl = put(kl, k, KL[k], PEERS)
        kl = tl.where(mimics, kl, 0.0)
        if REDUCTION == "none":
            loss = times(ce_weight, ce)
            if MUTUAL:
                loss += times(kl_weight * kl_scale, kl)
            tl.store(losses + n64 + tl.cast(N, tl.int64) * peer_at, loss, mask=peer_at < K)
        ce_sums += ce
        kl_sums += kl
        ce_count += tl.where(labelled, w_y, 0.0)
        labelled_rows += tl.where(labelled, 1.0, 0.0)
        if STATS:
            entropy_sums += tl.where(mimics, entropy, 0.0)
            right_sums += tl.where(right, 1.0, 0.0)
            together_right += tl.where(labelled & (together == y), 1.0, 0.0)
            pair_sums += tl.where(mimics, pairs, 0.0)

    if REDUCTION != "none" or STATS:
        mine = partials + tl.program_id(0) * LAYOUT.size
        is_peer = peer_at < K
        tl.store(mine + LAYOUT.ce + peer_at, ce_sums, mask=is_peer)
        tl.store(mine + LAYOUT.kl + peer_at, kl_sums, mask=is_peer)
        tl.store(mine + LAYOUT.label_weight, ce_count)
        tl.store(mine + LAYOUT.labelled, labelled_rows)
        if STATS:
            tl.store(mine + LAYOUT.entropy + peer_at, entropy_sums, mask=is_peer)
            tl.store(mine + LAYOUT.correct + peer_at, right_sums, mask=is_peer)
            tl.store(mine + LAYOUT.ensemble_correct, together_right)
            tl.store(mine + LAYOUT.pairwise_kl + pair_at, pair_sums, mask=is_pair)
    finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N, K, LAYOUT,
           PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS)  # fmt: skip
