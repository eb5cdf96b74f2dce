"""Loss, statistics and gradient of a cohort in one launch, each row held in registers.

A program takes ROWS samples, reads their K rows of logits once, and writes their K rows of
gradients once: the least a training step can move. It walks the samples with a stride of the whole
grid, so that the number of programs, and with it the work of the last one, stays bounded; the
last program to finish adds the programs' sums in a fixed order, so a result never depends on
which program finished when.

Notation follows the paper: z logits, p = softmax(z), q = softmax(z / T), K peers, N samples,
C classes. With constant teachers the gradient of sum_l w_kl KL(q_l || q_k) with respect to z_k is
(1/T) sum_l w_kl (q_k - q_l); differences are taken before sums, because peers agree late in
training and the terms cancel. Other divergences stand in `register_divergences`. Only the peers in
STUDENTS have gradients; all have losses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    SINGLE_READS,
    averaged,
    finish,
    loss_weights,
    open_gates,
    put,
    times,
)
from .register_divergences import (
    ensemble_divergences,
    gates_by_likelihood,
    gates_by_sharpness,
    log_probabilities,
    put_pairs,
    sloped_divergences,
    uniform_divergences,
    weighted_divergences,
)
from .register_functions import (
    as_numbers,
    cross_entropies,
    entropy_terms,
    first_of_ensemble,
    gradients,
    load_block,
    normalised,
    probabilities,
    right,
    store_row,
    widened,
)
from .register_reductions import reduced, row_totals, selected, weighed


@triton.jit(
    do_not_specialize=["N", "ignore_index", "label_stride"],
    do_not_specialize_on_alignment=SINGLE_READS,
)
def register_rows(
    logits,  # K pointers (N, C)
    grads,  # pointers (N, C) of the STUDENTS, or () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K) float32, or None
    class_weight,  # (C,) float32, or None
    sample_weight,  # (N,), or None: a row of weight w counts as w rows
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # packed statistics, float32
    partials,  # (programs, their size) float32
    counter,  # (1,) int32, zero before and after
    counts,  # (2,) float32, with sample_weight (3,): counted by an earlier launch, or None
    N, label_stride, ignore_index,
    ce_weight, kl_weight, temperature, label_smoothing,
    K: tl.constexpr, C: tl.constexpr,
    STUDENTS: tl.constexpr,  # the peers that have gradients
    STRIDES: tl.constexpr,  # per peer: logits row, logits column, gradient row
    READABLE: tl.constexpr,  # per peer: columns that may be read, C or more
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,  # a StatsLayout: of the statistics, and of a program's sums
    NEED_GRAD: tl.constexpr, STATS: tl.constexpr, REDUCTION: tl.constexpr,
    TARGET: tl.constexpr, GATE: tl.constexpr, EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr, JSD_BETA: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes row blocks b, b + programs, ..."""
    WEIGHTED: tl.constexpr = peer_weights is not None
    UNIFORM: tl.constexpr = (not WEIGHTED) and GATE == "none"
    HAS_CLASS_WEIGHT: tl.constexpr = class_weight is not None
    WEIGHED: tl.constexpr = sample_weight is not None
    GATED: tl.constexpr = GATE != "none"
    SLOPED: tl.constexpr = K > 1 and DIVERGENCE != "forward"
    S: tl.constexpr = LAYOUT.size

    # Whether there are registers for the next rows beside these.
    FEW: tl.constexpr = (
        K < 8
        and (TARGET == "peers" or K * BLOCK_C <= 4096)
        and (K == 2 or not (SLOPED and DIVERGENCE != "reverse"))
    )
    AHEAD: tl.constexpr = FEW or (
        UNIFORM and TARGET == "peers" and not (STATS or TEMPERED or SMOOTHED or SLOPED)
    )

    # ---- the first rows; what follows up to the loop happens while they are on their way
    cols = tl.arange(0, BLOCK_C)
    if AHEAD:
        y, W, RAW = load_block(logits, labels, label_stride, sample_weight, ignore_index,
                               tl.program_id(0), N, cols, ROWS, K, C, STRIDES,
                               READABLE)  # fmt: skip
    ce_weight, kl_weight, inv_t, kl_scale = loss_weights(
        ce_weight, kl_weight, temperature, CE_POINTER, KL_POINTER, T_POINTER, TEMPERED
    )
    ce_factor = ce_weight  # the factor of one row's gradient
    kl_factor = kl_weight * kl_scale * inv_t
    if NEED_GRAD and REDUCTION == "mean":
        ce_factor, kl_factor = averaged(
            ce_factor, kl_factor, counts, labels, label_stride, class_weight, sample_weight, N,
            ignore_index, MIMIC_IGNORED, C,
        )  # fmt: skip
    if HAS_CLASS_WEIGHT:
        w_c = tl.load(class_weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    else:
        w_c = tl.where(cols < C, 1.0, 0.0)
    w_total = tl.sum(w_c, axis=0)

    packed = tl.zeros((S,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        if not AHEAD:
            y, W, RAW = load_block(logits, labels, label_stride, sample_weight, ignore_index, block,
                                   N, cols, ROWS, K, C, STRIDES, READABLE)  # fmt: skip
        n = block * ROWS + tl.arange(0, ROWS)
        n64 = n.to(tl.int64)
        inside = n < N
        present = inside
        if WEIGHED:
            present = inside & (W[0] != 0.0)
        labelled = present & (y != ignore_index)
        # A label outside 0..C-1 is never used as an index; its row becomes NaN, so that it shows.
        fits = (y >= 0) & (y < C)
        misfit = labelled & (fits == 0)
        mimics = labelled
        if MIMIC_IGNORED:
            mimics = present
        is_y = cols[None, :] == y[:, None]
        w_y = tl.where(labelled, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            w_y = tl.load(class_weight + y, mask=labelled & fits, other=0.0).to(tl.float32)
        Z = widened(RAW, cols, K, C, READABLE)
        if AHEAD:  # the rows of the next turn are on their way through all of this one
            next_y, NEXT_W, RAW = load_block(logits, labels, label_stride, sample_weight,
                                             ignore_index, block + tl.num_programs(0), N, cols,
                                             ROWS, K, C, STRIDES, READABLE)  # fmt: skip

        # ---- normalisers and cross-entropy
        TOP, LSE, LSE_T, Z_Y, Q = normalised(Z, is_y, inv_t, K, TEMPERED)
        NLL = ()
        for k in tl.static_range(K):
            NLL = NLL + (tl.where(misfit, float("nan"), LSE[k] - Z_Y[k]),)
        CE = cross_entropies(Z, LSE, NLL, w_c, w_y, labelled, label_smoothing, K, C, SMOOTHED)
        RIGHT = (labelled,) * K
        if STATS or GATE == "correct":
            RIGHT = right(Z, TOP, NLL, labelled, y, cols, K, C)

        P = Q
        if TEMPERED:
            P = probabilities(Z, LSE, K)

        # ---- divergences
        GATES = ()
        SLOPES = ()
        if GATE == "confidence":
            GATES = gates_by_likelihood(NLL, labelled, peer_weights, K, EDGE)
        elif GATE == "entropy":
            GATES = gates_by_sharpness(reduced(entropy_terms(Z, LSE, P, K), K, "sum"),
                                       peer_weights, K, EDGE)  # fmt: skip
        elif GATED:
            GATES = open_gates(RIGHT, NLL, labelled, GATE, K)
        LOG_Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
        if K == 1:
            KL = (tl.zeros((ROWS,), tl.float32),)
        elif SLOPED:
            KL, SLOPES = sloped_divergences(LOG_Q, Q, peer_weights, GATES, w_y, K, EDGE, GATED,
                                            TARGET, DIVERGENCE, JSD_BETA)  # fmt: skip
        elif TARGET == "ensemble":
            KL = ensemble_divergences(LOG_Q, Q, peer_weights, GATES, w_y, K, EDGE, GATED)
        elif UNIFORM:
            KL = uniform_divergences(Z, LSE_T, Q, mimics, cols, inv_t, K, C, EDGE, TEMPERED)
        else:
            KL = weighted_divergences(LOG_Q, Q, peer_weights, GATES, w_y, K, EDGE, GATED)
        CE = weighed(CE, W, K)
        KL = weighed(selected(mimics, KL, K), W, K)

        # ---- the program's sums
        if REDUCTION != "none" or STATS:
            OF_ROWS = weighed((w_y, tl.where(labelled, 1.0, 0.0)), W, 2)
            TOTALS = row_totals(OF_ROWS + CE + KL, 2 + 2 * K)
            packed = put(packed, LAYOUT.label_weight, TOTALS[0], S)
            packed = put(packed, LAYOUT.labelled, TOTALS[1], S)
            for k in tl.static_range(K):
                packed = put(packed, LAYOUT.ce + k, TOTALS[2 + k], S)
                packed = put(packed, LAYOUT.kl + k, TOTALS[2 + K + k], S)
            if WEIGHED and MIMIC_IGNORED:  # see `reduce_programs`
                ROWS_IN_ALL = row_totals(selected(mimics, W, 1), 1)
                packed = put(packed, LAYOUT.pairwise_kl, ROWS_IN_ALL[0], S)
        if STATS:
            TERMS = entropy_terms(Z, LSE, P, K)
            HIT = (labelled & (first_of_ensemble(P, cols, K, C) == y),) + RIGHT
            ENTROPY = selected(mimics, reduced(TERMS, K, "sum"), K)
            OF_ROWS = weighed(as_numbers(HIT, 1 + K) + ENTROPY, W, 1 + 2 * K)
            TOTALS = row_totals(OF_ROWS, 1 + 2 * K)
            packed = put(packed, LAYOUT.ensemble_correct, TOTALS[0], S)
            for k in tl.static_range(K):
                packed = put(packed, LAYOUT.correct + k, TOTALS[1 + k], S)
                packed = put(packed, LAYOUT.entropy + k, TOTALS[1 + K + k], S)
            if K > 1:
                packed = put_pairs(packed, LOG_Q, Q, mimics, W, K, LAYOUT.pairwise_kl, S)
        if REDUCTION == "none":
            for k in tl.static_range(K):
                loss = times(ce_weight, CE[k])
                if K > 1:
                    loss += times(kl_weight * kl_scale, KL[k])
                tl.store(losses + n64 + tl.cast(N, tl.int64) * k, loss, mask=inside)

        # ---- write each gradient row once
        if NEED_GRAD:
            ce_row = tl.where(labelled, ce_factor, 0.0)
            kl_row = tl.where(mimics, kl_factor, 0.0)
            if WEIGHED:
                ce_row *= W[0]
                kl_row *= W[0]
            y_row = ce_row * w_y
            c_row = ce_row * 0.0
            p_row = y_row
            if SMOOTHED:
                y_row *= 1.0 - label_smoothing
                c_row = ce_row * label_smoothing / C
                p_row = y_row + c_row * w_total
            p_row = tl.where(misfit, float("nan"), p_row)
            has_kl = mimics & (tl.where(kl_factor != 0.0, 1, 0) == 1)
            G = gradients(P, Q, SLOPES, GATES, peer_weights, is_y, w_c, labelled, has_kl, p_row,
                          y_row, c_row, kl_row, STUDENTS, K, EDGE, GATED, SMOOTHED)  # fmt: skip
            for i in tl.static_range(len(STUDENTS)):
                store_row(grads[i], G[i], n64, inside, cols, STRIDES[STUDENTS[i]][2], C)
        if AHEAD:
            y = next_y
            W = NEXT_W

    if REDUCTION != "none" or STATS:
        tl.store(partials + tl.program_id(0) * S + tl.arange(0, S), packed)
    finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N, K, LAYOUT,
           PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS, WEIGHED)  # fmt: skip
