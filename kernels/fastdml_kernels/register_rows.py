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

from .device_functions import (
    SINGLE_READS,
    averaged,
    finish,
    log_probability,
    loss_weights,
    open_gates,
    put,
    times,
)
from .register_functions import load_rows, reduced, store_row


@triton.jit(
    do_not_specialize=["N", "ignore_index", "label_stride"],
    do_not_specialize_on_alignment=SINGLE_READS,
)
def register_rows(
    logits,  # K pointers (N, C)
    grads,  # K pointers (N, C), or () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K) float32, or None
    class_weight,  # (C,) float32, or None
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # packed statistics, float32
    partials,  # (programs, their size) float32
    counter,  # (1,) int32, zero before and after
    counts,  # (2,) float32: label counts taken by an earlier launch, or None
    N, label_stride, ignore_index,
    ce_weight, kl_weight, temperature, label_smoothing,
    K: tl.constexpr, C: tl.constexpr,
    STRIDES: tl.constexpr,  # per peer: logits row, logits column, gradient row
    READABLE: tl.constexpr,  # per peer: columns that may be read, C or more
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,  # a StatsLayout: of the statistics, and of a program's sums
    NEED_GRAD: tl.constexpr, STATS: tl.constexpr, REDUCTION: tl.constexpr,
    TARGET: tl.constexpr, GATE: tl.constexpr, EDGE: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes row blocks b, b + programs, ..."""
    WEIGHTED: tl.constexpr = peer_weights is not None
    UNIFORM: tl.constexpr = (not WEIGHTED) and GATE == "none"
    HAS_CLASS_WEIGHT: tl.constexpr = class_weight is not None
    S: tl.constexpr = LAYOUT.size

    ce_weight, kl_weight, inv_t, kl_scale = loss_weights(
        ce_weight, kl_weight, temperature, CE_POINTER, KL_POINTER, T_POINTER, TEMPERED
    )
    ce_factor = ce_weight  # the factor of one row's gradient
    kl_factor = kl_weight * kl_scale * inv_t
    if NEED_GRAD and REDUCTION == "mean":
        ce_factor, kl_factor = averaged(
            ce_factor, kl_factor, counts, labels, label_stride, class_weight, N, ignore_index,
            HAS_CLASS_WEIGHT, MIMIC_IGNORED, C,
        )  # fmt: skip

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
        # A label outside 0..C-1 is never used as an index; its row becomes NaN, so that it shows.
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
        RAW = load_rows(logits, n64, inside, cols, K, STRIDES, READABLE)
        Z = ()
        for k in tl.static_range(K):
            Z = Z + (tl.where(is_class[None, :], RAW[k].to(tl.float32), float("-inf")),)
        TOP = reduced(Z, K, "max")
        SUMMED = ()
        for k in tl.static_range(K):
            SUMMED = SUMMED + (tl.exp(Z[k] - TOP[k][:, None]),)
        for k in tl.static_range(K):
            SUMMED = SUMMED + (tl.where(is_y, Z[k], 0.0),)
        if TEMPERED:
            for k in tl.static_range(K):  # products are fused by name: see `log_probability`
                top_t = TOP[k] * inv_t
                SUMMED = SUMMED + (tl.exp(tl.fma(Z[k], inv_t, -top_t[:, None])),)
        SUMS = reduced(SUMMED, 3 * K if TEMPERED else 2 * K, "sum")
        LSE = ()
        LSE_T = ()
        NLL = ()
        RIGHT = ()
        for k in tl.static_range(K):
            lse = TOP[k] + tl.log(SUMS[k])
            lse_t = lse
            if TEMPERED:
                lse_t = tl.fma(TOP[k], inv_t, tl.log(SUMS[2 * K + k]))
            LSE = LSE + (lse,)
            LSE_T = LSE_T + (lse_t,)
            NLL = NLL + (tl.where(misfit, float("nan"), lse - SUMS[K + k]),)
        if STATS or GATE == "correct":
            AT = ()
            for k in tl.static_range(K):
                AT = AT + (tl.where(Z[k] == TOP[k][:, None], cols[None, :], C),)
            FIRST = reduced(AT, K, "min")
            for k in tl.static_range(K):  # a peer that is NaN is never right
                RIGHT = RIGHT + (labelled & (FIRST[k] == y) & (NLL[k] == NLL[k]),)
        else:
            RIGHT = (labelled,) * K

        # ---- cross-entropy
        CE = ()
        for k in tl.static_range(K):
            ce = w_y * NLL[k]
            if SMOOTHED:
                below = times(w_c[None, :] + 0.0 * is_y, LSE[k][:, None] - Z[k])
                towards_all = tl.sum(below, axis=1)
                ce = (1.0 - label_smoothing) * ce + label_smoothing / C * towards_all
            CE = CE + (tl.where(labelled, ce, 0.0),)

        # ---- which peers teach on these rows
        GATES = ()
        if GATE != "none":
            GATES = open_gates(RIGHT, NLL, labelled, GATE, K)

        # ---- Kullback-Leibler terms. d_l = log q_l - max over peers: exactly 0 for identical
        # peers, and -inf only where a peer rules a class out and another does not.
        KL = ()
        if K > 1:
            top = log_probability(Z[0], inv_t, LSE_T[0][:, None], TEMPERED)
            for k in tl.static_range(1, K):
                log_q = log_probability(Z[k], inv_t, LSE_T[k][:, None], TEMPERED)
                top = tl.maximum(top, log_q)
            top = tl.where(top == float("-inf"), 0.0, top)
            Q = ()
            D = ()
            for k in tl.static_range(K):
                log_q = log_probability(Z[k], inv_t, LSE_T[k][:, None], TEMPERED)
                Q = Q + (tl.exp(log_q),)
                D = D + (log_q - top,)
            if UNIFORM and TARGET == "peers":
                mass = Q[0]
                energy = times(Q[0], D[0])
                for k in tl.static_range(1, K):
                    mass += Q[k]
                    energy += times(Q[k], D[k])
                PARTS = ()
                for k in tl.static_range(K):
                    PARTS = PARTS + (energy - times(mass, D[k]),)
                SUMS = reduced(PARTS, K, "sum")
                for k in tl.static_range(K):
                    KL = KL + (tl.where(mimics, SUMS[k] * EDGE, 0.0),)
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
                packed = put(packed, LAYOUT.ce + k, tl.sum(CE[k], axis=0), S)
                if K > 1:
                    packed = put(packed, LAYOUT.kl + k, tl.sum(KL[k], axis=0), S)
            packed = put(packed, LAYOUT.label_weight,
                         tl.sum(tl.where(labelled, w_y, 0.0), axis=0), S)  # fmt: skip
            packed = put(packed, LAYOUT.labelled,
                         tl.sum(tl.where(labelled, 1.0, 0.0), axis=0), S)  # fmt: skip
        if STATS:
            p_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
            for k in tl.static_range(K):
                if K > 1 and not TEMPERED:
                    p = Q[k]
                    log_p = D[k] + top
                else:
                    log_p = Z[k] - LSE[k][:, None]
                    p = tl.exp(log_p)
                p_sum += p
                entropy = -tl.sum(times(p, log_p), axis=1)
                packed = put(packed, LAYOUT.entropy + k,
                             tl.sum(tl.where(mimics, entropy, 0.0), axis=0), S)  # fmt: skip
                packed = put(packed, LAYOUT.correct + k,
                             tl.sum(tl.where(RIGHT[k], 1.0, 0.0), axis=0), S)  # fmt: skip
            highest = tl.max(p_sum, axis=1)
            first = tl.min(tl.where(p_sum == highest[:, None], cols[None, :], C), axis=1)
            hit = labelled & (first == y)
            packed = put(packed, LAYOUT.ensemble_correct,
                         tl.sum(tl.where(hit, 1.0, 0.0), axis=0), S)  # fmt: skip
            if K > 1:
                for l in tl.static_range(K):  # noqa: E741
                    for k in tl.static_range(K):
                        if l != k:
                            pair = tl.sum(times(Q[l], D[l] - D[k]), axis=1)
                            pair = tl.where(mimics, pair, 0.0)
                            packed = put(packed, LAYOUT.pairwise_kl + l * K + k,
                                         tl.sum(pair, axis=0), S)  # fmt: skip
        if REDUCTION == "none":
            for k in tl.static_range(K):
                loss = times(ce_weight, CE[k])
                if K > 1:
                    loss += times(kl_weight * kl_scale, KL[k])
                tl.store(losses + n64 + tl.cast(N, tl.int64) * k, loss, mask=inside)

        # ---- write each gradient row once
        if NEED_GRAD:
            # Where a term has no part it is selected away, not multiplied by 0: its factor, or
            # another peer in it, may be infinite or NaN.
            has_kl = (mimics & (tl.where(kl_factor != 0.0, 1, 0) == 1))[:, None]
            ce_row = tl.where(labelled, ce_factor, 0.0)[:, None]
            kl_row = tl.where(mimics, kl_factor, 0.0)[:, None]
            bad = tl.where(misfit, float("nan"), 0.0)[:, None]
            if K > 1 and UNIFORM:
                # q_k - mean of the others, from differences to the first peer
                away = tl.zeros((ROWS, BLOCK_C), tl.float32)
                for k in tl.static_range(1, K):
                    away += Q[k] - Q[0]
            for k in tl.static_range(K):
                if K > 1 and not TEMPERED:
                    p = Q[k]
                else:
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
                    g += tl.where(has_kl, kl_row * pull, 0.0)
                g += bad
                store_row(grads[k], g, n64, inside, cols, STRIDES[k][2], C)

    if REDUCTION != "none" or STATS:
        tl.store(partials + tl.program_id(0) * S + tl.arange(0, S), packed)
    finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N, K, LAYOUT,
           PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS)  # fmt: skip
