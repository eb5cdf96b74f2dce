"""Loss, statistics and gradient of a cohort in one launch, each row held in registers.

A program takes ROWS samples, reads their K rows of logits once, and writes their K rows of
gradients once: the least a training step can move. It walks the samples with a stride of the whole
grid, so that the number of programs, and with it the work of the last one, stays bounded; the
last program to finish adds the programs' sums in a fixed order, so a result never depends on
which program finished when.

Notation follows the paper: z logits, p = softmax(z), q = softmax(z / T), K peers, N samples,
C classes. With constant teachers the gradient of sum_l w_kl KL(q_l || q_k) with respect to z_k is
(1/T) sum_l w_kl (q_k - q_l); differences are taken before sums, because peers agree late in
training and the terms cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scalar(x, IS_POINTER: tl.constexpr):
    """A float32 that came as a number or as a 0-d tensor."""
    if IS_POINTER:
        return tl.load(x).to(tl.float32)
    return tl.cast(x, tl.float32)


@triton.jit
def times(q, gap):
    """q * gap, where a class that the teacher gives no probability contributes 0, never 0 * inf."""
    return tl.where(q == 0.0, 0.0, q * gap)


@triton.jit
def put(packed, position: tl.constexpr, value, S: tl.constexpr):
    """Adds a scalar to one of the S sums that a program carries, one register a thread for all."""
    return packed + tl.where(tl.arange(0, S) == position, value, 0.0)


@triton.jit
def count_rows(labels, label_stride, class_weight, N, ignore_index,
               HAS_CLASS_WEIGHT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(sum of the labelled rows' class weights, number of labelled rows) over all N labels."""
    BLOCK: tl.constexpr = 1024
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    rows = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        y = tl.load(labels + n.to(tl.int64) * label_stride, mask=n < N, other=ignore_index)
        labelled = y != ignore_index
        rows += tl.where(labelled, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            known = labelled & (y >= 0) & (y < C)
            weight_sum += tl.load(class_weight + y, mask=known, other=0.0).to(tl.float32)
    count = tl.sum(rows, axis=0)
    if HAS_CLASS_WEIGHT:
        return tl.sum(weight_sum, axis=0), count
    return count, count


@triton.jit
def inverse(count):
    """1 / count, and 0 where nothing was counted: no row then has a gradient."""
    return tl.where(count > 0, 1.0 / tl.maximum(count, 1e-38), 0.0)


@triton.jit
def reduce_programs(partials, losses, stats, ce_weight, kl_weight, kl_scale, N,
                    K: tl.constexpr, S: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
                    REDUCTION: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
                    STATS: tl.constexpr):  # fmt: skip
    """Adds the programs' sums in a fixed order and writes losses (K,) and statistics (S,).

    The order of the sums, here and in `stats`: ce K, kl K, weight of labelled rows, labelled
    rows; with STATS also entropy K, correct K, ensemble_correct, pairwise KL (K, K).
    """
    programs = tl.num_programs(0)
    s = tl.arange(0, S)
    total = tl.zeros((S,), tl.float32)
    for start in range(0, programs, PROGRAMS_BLOCK):
        b = start + tl.arange(0, PROGRAMS_BLOCK)
        part = tl.load(partials + b[:, None] * S + s[None, :], mask=(b < programs)[:, None],
                       other=0.0, cache_modifier=".cg")  # fmt: skip
        total += tl.sum(part, axis=0)
    ce_count = tl.sum(tl.where(s == 2 * K, total, 0.0), axis=0)
    labelled = tl.sum(tl.where(s == 2 * K + 1, total, 0.0), axis=0)
    kl_count = labelled
    if MIMIC_IGNORED:
        kl_count = tl.cast(N, tl.float32)
        # a batch without any label teaches by the KL term alone
        ce_count = tl.where(labelled == 0, 1.0, ce_count)
    is_ce = s < K
    is_kl = (s >= K) & (s < 2 * K)
    is_count = (s == 2 * K) | (s == 2 * K + 1)
    mean = total / tl.where(is_ce, ce_count, kl_count)
    mean = tl.where(is_kl, mean * kl_scale, mean)
    if STATS:
        is_pair = (s >= 4 * K + 3) & (s < 4 * K + 3 + K * K)
        mean = tl.where(is_pair, mean * kl_scale, mean)
        is_count = is_count | ((s >= 3 * K + 2) & (s < 4 * K + 3))
        tl.store(stats + s, tl.where(is_count, total, mean))
    if REDUCTION != "none":
        value = mean
        if REDUCTION == "sum":
            value = tl.where(is_kl, total * kl_scale, total)
        for k in tl.static_range(K):
            ce = tl.sum(tl.where(s == k, value, 0.0), axis=0)
            kl = tl.sum(tl.where(s == K + k, value, 0.0), axis=0)
            loss = ce_weight * ce
            if K > 1:
                loss += kl_weight * kl
            tl.store(losses + k, loss)


@triton.jit(do_not_specialize=["N", "ignore_index", "label_stride"])
def register_rows(
    logits,  # K pointers (N, C)
    grads,  # K pointers (N, C), or () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K) float32, or None
    class_weight,  # (C,) float32, or None
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # (S,) float32
    partials,  # (programs, S) float32
    counter,  # (1,) int32, zero before and after
    counts,  # (2,) float32: label counts taken by an earlier launch, or None
    N, label_stride, ignore_index,
    ce_weight, kl_weight, temperature, label_smoothing,
    K: tl.constexpr, C: tl.constexpr,
    STRIDES: tl.constexpr,  # per peer: logits row, logits column, gradient row
    READABLE: tl.constexpr,  # per peer: columns that may be read, C or more
    WRITABLE: tl.constexpr,  # columns of a gradient row that may be written, C or more
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, S: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
    NEED_GRAD: tl.constexpr, STATS: tl.constexpr, REDUCTION: tl.constexpr,
    TARGET: tl.constexpr, GATE: tl.constexpr, EDGE: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes row blocks b, b + programs, ..."""
    WEIGHTED: tl.constexpr = peer_weights is not None
    UNIFORM: tl.constexpr = (not WEIGHTED) and GATE == "none"
    HAS_CLASS_WEIGHT: tl.constexpr = class_weight is not None

    ce_weight = scalar(ce_weight, CE_POINTER)
    kl_weight = scalar(kl_weight, KL_POINTER)
    inv_t = 1.0
    kl_scale = 1.0  # T**2
    if TEMPERED:
        t = scalar(temperature, T_POINTER)
        inv_t = 1.0 / t
        kl_scale = t * t

    # What one row's gradient is multiplied by.
    ce_factor = ce_weight
    kl_factor = kl_weight * kl_scale * inv_t
    if NEED_GRAD and REDUCTION == "mean":
        if counts is None:
            ce_count, labelled_rows = count_rows(labels, label_stride, class_weight, N,
                                                 ignore_index, HAS_CLASS_WEIGHT, C)  # fmt: skip
        else:
            ce_count = tl.load(counts)
            labelled_rows = tl.load(counts + 1)
        ce_factor *= inverse(ce_count)
        if MIMIC_IGNORED:
            kl_factor *= 1.0 / tl.cast(N, tl.float32)
        else:
            kl_factor *= inverse(labelled_rows)

    cols = tl.arange(0, BLOCK_C)
    is_class = cols < C
    if HAS_CLASS_WEIGHT:
        w_c = tl.load(class_weight + cols, mask=is_class, other=0.0).to(tl.float32)
    else:
        w_c = tl.where(is_class, 1.0, 0.0)
    w_total = tl.sum(w_c, axis=0)

    packed = tl.zeros((S,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        n = block * ROWS + tl.arange(0, ROWS)
        n64 = n.to(tl.int64)
        inside = n < N
        y = tl.load(labels + n64 * label_stride, mask=inside, other=ignore_index)
        labelled = inside & (y != ignore_index)
        # A label outside 0..C-1 is never used as an index; its row turns NaN, to be seen.
        misfit = labelled & ((y < 0) | (y >= C))
        mimics = labelled
        if MIMIC_IGNORED:
            mimics = inside
        is_y = cols[None, :] == y[:, None]
        w_y = tl.where(labelled, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            w_y = tl.load(class_weight + y, mask=labelled & (y >= 0) & (y < C), other=0.0)
            w_y = w_y.to(tl.float32)

        # ---- read each row once; its normalisers
        Z = ()
        LSE = ()
        LSE_T = ()
        NLL = ()
        RIGHT = ()
        for k in tl.static_range(K):
            z = tl.load(logits[k] + n64[:, None] * STRIDES[k][0] + cols[None, :] * STRIDES[k][1],
                        mask=inside[:, None] & (cols < READABLE[k])[None, :],
                        other=0.0).to(tl.float32)  # fmt: skip
            z = tl.where(is_class[None, :], z, float("-inf"))
            m = tl.max(z, axis=1)
            lse = m + tl.log(tl.sum(tl.exp(z - m[:, None]), axis=1))
            lse_t = lse
            if TEMPERED:
                m_t = m * inv_t
                lse_t = m_t + tl.log(tl.sum(tl.exp(z * inv_t - m_t[:, None]), axis=1))
            nll = lse - tl.sum(tl.where(is_y, z, 0.0), axis=1)
            nll = tl.where(misfit, float("nan"), nll)
            right = labelled
            if STATS or GATE == "correct":
                first = tl.min(tl.where(z == m[:, None], cols[None, :], C), axis=1)
                right = labelled & (first == y)
            Z = Z + (z,)
            LSE = LSE + (lse,)
            LSE_T = LSE_T + (lse_t,)
            NLL = NLL + (nll,)
            RIGHT = RIGHT + (right,)

        # ---- cross-entropy
        CE = ()
        for k in tl.static_range(K):
            ce = w_y * NLL[k]
            if SMOOTHED:
                towards_all = tl.sum(
                    times(w_c[None, :] + 0.0 * is_y, LSE[k][:, None] - Z[k]), axis=1)
                ce = (1.0 - label_smoothing) * ce + label_smoothing / C * towards_all
            CE = CE + (tl.where(labelled, ce, 0.0),)

        # ---- who teaches on these rows
        GATES = ()
        if GATE == "correct":
            for k in tl.static_range(K):
                GATES = GATES + (tl.where(RIGHT[k], 1.0, 0.0),)
        elif GATE == "best":
            best = NLL[0]
            for k in tl.static_range(1, K):
                best = tl.minimum(best, NLL[k])
            free = labelled  # the first peer that reaches the minimum
            for k in tl.static_range(K):
                teaches = free & (NLL[k] == best)
                free = free & (NLL[k] != best)
                GATES = GATES + (tl.where(teaches, 1.0, 0.0),)

        # ---- Kullback-Leibler terms. d_l = log q_l - max over peers: exactly 0 for identical
        # peers, and -inf only where a peer rules a class out and another does not.
        KL = ()
        if K > 1:
            top = Z[0] * inv_t - LSE_T[0][:, None]
            for k in tl.static_range(1, K):
                top = tl.maximum(top, Z[k] * inv_t - LSE_T[k][:, None])
            top = tl.where(top == float("-inf"), 0.0, top)
            Q = ()
            D = ()
            for k in tl.static_range(K):
                log_q = Z[k] * inv_t - LSE_T[k][:, None]
                Q = Q + (tl.exp(log_q),)
                D = D + (log_q - top,)
            if UNIFORM and TARGET == "peers":
                mass = Q[0]
                energy = times(Q[0], D[0])
                for k in tl.static_range(1, K):
                    mass += Q[k]
                    energy += times(Q[k], D[k])
                for k in tl.static_range(K):
                    kl = tl.sum(energy - times(mass, D[k]), axis=1) * EDGE
                    KL = KL + (tl.where(mimics, kl, 0.0),)
            else:
                for k in tl.static_range(K):
                    kl = tl.zeros((ROWS,), tl.float32)
                    mass = tl.zeros((ROWS, BLOCK_C), tl.float32)
                    mixed = tl.zeros((ROWS, BLOCK_C), tl.float32)
                    w_sum = tl.zeros((ROWS,), tl.float32)
                    for l in tl.static_range(K):  # noqa: E741
                        if l != k:
                            w = tl.full((ROWS,), EDGE, tl.float32)
                            if WEIGHTED:
                                w = tl.load(peer_weights + k * K + l).to(tl.float32) + 0.0 * w
                            if GATE != "none":
                                w *= GATES[l]
                            if TARGET == "peers":
                                pair = tl.sum(times(Q[l], D[l] - D[k]), axis=1)
                                kl += times(w, pair)
                            else:
                                w_sum += w
                                mass += times(w[:, None] + 0.0 * mass, Q[l])
                                mixed += times(w[:, None] + 0.0 * mass, tl.exp(D[l]))
                    if TARGET == "ensemble":
                        scale = tl.where(w_sum > 0, w_sum, 1.0)
                        log_mixed = tl.log(mixed / scale[:, None])
                        kl = tl.sum(times(mass, log_mixed - D[k]), axis=1)
                    KL = KL + (tl.where(mimics, kl, 0.0),)

        # ---- the programs' sums
        if REDUCTION != "none" or STATS:
            for k in tl.static_range(K):
                packed = put(packed, k, tl.sum(CE[k], axis=0), S)
                if K > 1:
                    packed = put(packed, K + k, tl.sum(KL[k], axis=0), S)
            packed = put(packed, 2 * K, tl.sum(tl.where(labelled, w_y, 0.0), axis=0), S)
            packed = put(packed, 2 * K + 1, tl.sum(tl.where(labelled, 1.0, 0.0), axis=0), S)
        if STATS:
            p_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
            for k in tl.static_range(K):
                log_p = Z[k] - LSE[k][:, None]
                p = tl.exp(log_p)
                p_sum += p
                entropy = -tl.sum(times(p, log_p), axis=1)
                packed = put(packed, 2 * K + 2 + k,
                             tl.sum(tl.where(mimics, entropy, 0.0), axis=0), S)  # fmt: skip
                packed = put(packed, 3 * K + 2 + k,
                             tl.sum(tl.where(RIGHT[k], 1.0, 0.0), axis=0), S)  # fmt: skip
            highest = tl.max(p_sum, axis=1)
            first = tl.min(tl.where(p_sum == highest[:, None], cols[None, :], C), axis=1)
            hit = labelled & (first == y)
            packed = put(packed, 4 * K + 2, tl.sum(tl.where(hit, 1.0, 0.0), axis=0), S)
            if K > 1:
                for l in tl.static_range(K):  # noqa: E741
                    for k in tl.static_range(K):
                        if l != k:
                            pair = tl.sum(times(Q[l], D[l] - D[k]), axis=1)
                            packed = put(packed, 4 * K + 3 + l * K + k,
                                         tl.sum(tl.where(mimics, pair, 0.0), axis=0), S)  # fmt: skip
        if REDUCTION == "none":
            for k in tl.static_range(K):
                loss = ce_weight * CE[k]
                if K > 1:
                    loss += kl_weight * kl_scale * KL[k]
                tl.store(losses + n64 + tl.cast(N, tl.int64) * k, loss, mask=inside)

        # ---- write each gradient row once
        if NEED_GRAD:
            # select, not multiply: a factor may be inf or NaN where a row has no part
            ce_row = tl.where(labelled, ce_factor, 0.0)[:, None]
            kl_row = tl.where(mimics, kl_factor, 0.0)[:, None]
            bad = tl.where(misfit, float("nan"), 0.0)[:, None]
            if K > 1 and UNIFORM:
                # q_k - mean of the others, from differences to the first peer
                away = tl.zeros((ROWS, BLOCK_C), tl.float32)
                for k in tl.static_range(1, K):
                    away += Q[k] - Q[0]
            for k in tl.static_range(K):
                p = tl.exp(Z[k] - LSE[k][:, None])
                g = w_y[:, None] * (p - tl.where(is_y, 1.0, 0.0))
                if SMOOTHED:
                    g = ((1.0 - label_smoothing) * g
                         + label_smoothing / C * (w_total * p - w_c[None, :]))  # fmt: skip
                g = tl.where(labelled[:, None], ce_row * g, 0.0)
                if K > 1:
                    if UNIFORM:
                        pull = (K * (Q[k] - Q[0]) - away) * EDGE
                    else:
                        pull = tl.zeros((ROWS, BLOCK_C), tl.float32)
                        for l in tl.static_range(K):  # noqa: E741
                            if l != k:
                                w = tl.full((ROWS,), EDGE, tl.float32)
                                if WEIGHTED:
                                    w = tl.load(peer_weights + k * K + l).to(tl.float32) + 0.0 * w
                                if GATE != "none":
                                    w *= GATES[l]
                                pull += times(w[:, None] + 0.0 * pull, Q[k] - Q[l])
                    g += tl.where(mimics[:, None], kl_row * pull, 0.0)
                g += bad
                tl.store(grads[k] + n64[:, None] * STRIDES[k][2] + cols[None, :],
                         g.to(grads[k].dtype.element_ty),
                         mask=inside[:, None] & (cols < WRITABLE)[None, :])  # fmt: skip

    # ---- the last program to finish adds up
    if REDUCTION != "none" or STATS:
        tl.store(partials + tl.program_id(0) * S + tl.arange(0, S), packed)
        tl.debug_barrier()  # every thread's sums are written before this program counts as done
        done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == tl.num_programs(0) - 1:
            reduce_programs(partials, losses, stats, ce_weight, kl_weight, kl_scale, N, K, S,
                            PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS)  # fmt: skip
            tl.store(counter, 0)
