"""The loss where each peer's gradient depends on more than the others' probabilities: symmetric
divergences, gradients into the teachers, and target="ensemble_logits", a mean of logits.

A program takes one sample at a time, and a row may have any number of classes. The steps are those
of `wide_rows`; K is 2 or more. Where the divergence is symmetric or the teachers learn, the
gradient contains the divergences themselves, for example

    d KL(q_j || q_o) / d z_j = (1/T) q_j (log q_j - log q_o - KL(q_j || q_o)),

so that they must be known before the first gradient is written. Divergences between two peers come
from the first pass, as a running sum for each ordered pair. A mixed teacher t_k, a mean of
probabilities or of logits, needs extra passes between the first and the second:

- target="ensemble_logits": one for the normaliser of the mixed logits, which depends on which peers
  teach on the row;
- any mixed target where the gradient contains divergences: one for these.

All of it is O(K**2 C), and takes all the registers there are: no block is loaded ahead.
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
from .mixed_teachers import (
    mean_logits_normalisers,
    mixed_divergences,
    mixed_kl,
    mixed_teacher,
    share_of_gap,
)
from .online_softmax import online_sums
from .wide_functions import (
    add_block_to_pairs,
    ce_gradient,
    edge,
    ensemble_argmax,
    kl_of_pairs,
    load_peers,
    load_upstream,
    log_probabilities,
    pairs_of_sums,
    read_label,
    row_losses,
    row_start,
    store_early_sums,
    store_sums,
    sum_class_weights,
    teacher_weights,
)

# ---- a block of the KL gradient with respect to peer j's z / T. The divergences that it holds lie
# in `row_pairs`, this program's (3, K, K): KL(q_l || q_k), `toward` and `ratios`, each at [l, k].


@triton.jit
def learning_from_mixture(j: tl.constexpr, Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE,
                          BACK, inv_t, K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                          TARGET: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """The gradient of student j's divergence from its mixed teacher through j's own prediction."""
    gap, t = mixed_teacher(j, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                           K, EDGE, GATED, TARGET)  # fmt: skip
    slope = Q[j] - t
    if SYMMETRIC:
        slope += times(Q[j], D[j] - gap) - times(Q[j], BACK[j])
    return slope


@triton.jit
def learning_from_peer(j: tl.constexpr, o: tl.constexpr, D, Q, row_pairs,
                       K: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """The gradient of student j's divergence from teacher o through j's own prediction."""
    slope = Q[j] - Q[o]
    if SYMMETRIC:
        kl = tl.load(row_pairs + j * K + o)
        slope += times(Q[j], D[j] - D[o]) - times(Q[j], kl)
    return slope


@triton.jit
def teaching_peer(j: tl.constexpr, o: tl.constexpr, D, Q, row_pairs,
                  K: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """The gradient of student o's divergence from teacher j through j's prediction as teacher."""
    kl = tl.load(row_pairs + j * K + o)
    slope = times(Q[j], D[j] - D[o]) - times(Q[j], kl)
    if SYMMETRIC:
        slope += Q[j] - Q[o]
    return slope


@triton.jit
def teaching_mixture(j: tl.constexpr, o: tl.constexpr, Z, D, Q, top, row_pairs, peer_weights, GATES,
                     DIVISOR, MIX_LSE, FORWARD, inv_t,
                     K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                     TARGET: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """The gradient of student o's divergence from its mixed teacher through peer j's part in it."""
    gap, t = mixed_teacher(o, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                           K, EDGE, GATED, TARGET)  # fmt: skip
    if TARGET == "ensemble":
        toward = tl.load(row_pairs + K * K + j * K + o)
        slope = share_of_gap(Q[j], gap, D[o]) - times(Q[j], toward)
        if SYMMETRIC:
            ratios = tl.load(row_pairs + 2 * K * K + j * K + o)
            ratio = tl.where(t == 0.0, 0.0, Q[j] * Q[o] / t)
            slope += times(Q[j], ratios) - ratio
    else:
        slope = times(t, gap - D[o]) - times(t, FORWARD[o])
        if SYMMETRIC:
            slope += t - Q[o]
    return slope


@triton.jit
def coupled_pull(j: tl.constexpr, Z, D, Q, top, row_pairs, peer_weights, GATES, WEIGHT, DIVISOR,
                 MIX_LSE, FORWARD, BACK, UP, inv_t,
                 K: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                 TARGET: tl.constexpr, SYMMETRIC: tl.constexpr, DETACH: tl.constexpr):  # fmt: skip
    """The KL gradient for peer j: the sum of the terms above over all students, each multiplied by
    its loss's upstream gradient UP."""
    HALF: tl.constexpr = 0.5 if SYMMETRIC else 1.0
    pull = tl.zeros((BLOCK_C,), tl.float32)
    if TARGET != "peers":
        slope = learning_from_mixture(j, Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE, BACK,
                                      inv_t, K, EDGE, GATED, TARGET, SYMMETRIC)  # fmt: skip
        pull += times(HALF * UP[j] * WEIGHT[j], slope)
    for o in tl.static_range(K):
        if o != j:
            if TARGET == "peers":
                w = edge(j, o, peer_weights, GATES, K, EDGE, GATED)
                slope = learning_from_peer(j, o, D, Q, row_pairs, K, SYMMETRIC)
                pull += times(HALF * UP[j] * w, slope)
            if not DETACH:
                w = edge(o, j, peer_weights, GATES, K, EDGE, GATED)
                if TARGET == "peers":
                    slope = teaching_peer(j, o, D, Q, row_pairs, K, SYMMETRIC)
                else:
                    slope = teaching_mixture(j, o, Z, D, Q, top, row_pairs, peer_weights, GATES,
                                             DIVISOR, MIX_LSE, FORWARD, inv_t, K, EDGE, GATED,
                                             TARGET, SYMMETRIC)  # fmt: skip
                pull += times(HALF * UP[o] * w, slope)
    return pull


@triton.jit(
    do_not_specialize=["N", "ignore_index", "label_stride", "u_stride_k", "u_stride_n"],
    do_not_specialize_on_alignment=SINGLE_READS,
)
def coupled_rows(
    logits,  # K pointers (N, C)
    grads,  # pointers (N, C) of the STUDENTS, or () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K), or None
    class_weight,  # (C,), or None
    sample_weight,  # (N,), or None: a row of weight w counts as w rows
    upstream,  # the losses' own gradient, (K,) or (K, N) by its strides, or None for 1
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # packed statistics, float32
    partials,  # (programs, their size) float32
    scratch,  # (programs, 3 K K) float32: the divergences of one row
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
    STUDENTS: tl.constexpr,  # the peers whose gradients are wanted
    TARGET: tl.constexpr, GATE: tl.constexpr, EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr, JSD_BETA: tl.constexpr, DETACH: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes samples b, b + programs, ..."""
    SYMMETRIC: tl.constexpr = DIVERGENCE == "jeffreys"
    MIXED: tl.constexpr = TARGET != "peers"
    GATED: tl.constexpr = GATE != "none"
    # whether the gradient contains divergences; else the teacher is a constant mean of logits
    COUPLED: tl.constexpr = NEED_GRAD and (SYMMETRIC or not DETACH)
    SECOND: tl.constexpr = NEED_GRAD or STATS or MIXED  # whether there is a second pass
    ONLINE_PAIRS: tl.constexpr = (not MIXED) and (COUPLED or not SECOND)
    VALUES_PASS: tl.constexpr = MIXED and COUPLED
    TO_PEERS: tl.constexpr = TARGET == "ensemble" and not DETACH
    LAST_BLOCK: tl.constexpr = (C - 1) // BLOCK_C * BLOCK_C

    # 1. Weights of the two terms, and the factor of one row's gradient of each: for a mean, divided
    #    by the number of labelled rows.
    ce_weight, kl_weight, inv_t, kl_scale = loss_weights(
        ce_weight, kl_weight, temperature, CE_POINTER, KL_POINTER, T_POINTER, TEMPERED
    )
    ce_factor = ce_weight
    kl_factor = kl_weight * kl_scale * inv_t
    if NEED_GRAD and REDUCTION == "mean":
        ce_factor, kl_factor = averaged(
            ce_factor, kl_factor, counts, labels, label_stride, class_weight, sample_weight, N,
            ignore_index, MIMIC_IGNORED, C,
        )  # fmt: skip
    w_total = sum_class_weights(class_weight, C, BLOCK_C, SMOOTHED)

    # 2. This program's sums over its rows.
    peer = tl.arange(0, PEERS)
    teacher = peer[:, None]
    student = peer[None, :]
    is_pair = (teacher < K) & (student < K)
    pair_at = teacher * K + student
    ce_sums = tl.zeros((PEERS,), tl.float32)
    kl_sums = tl.zeros((PEERS,), tl.float32)
    entropy_sums = tl.zeros((PEERS,), tl.float32)
    correct_sums = tl.zeros((PEERS,), tl.float32)
    pair_sums = tl.zeros((PEERS, PEERS), tl.float32)
    ce_count = tl.cast(0.0, tl.float32)
    labelled_rows = tl.cast(0.0, tl.float32)
    ensemble_correct = tl.cast(0.0, tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        n64 = tl.cast(n, tl.int64)

        # 3. The row's label.
        y, labelled, fits, misfit, mimics, w_y = read_label(
            labels, label_stride, ignore_index, class_weight, n64, C, MIMIC_IGNORED
        )

        # 4. [online softmax] First pass: maxima and normalisers, divergences of single peers.
        M, SUM, SUM_T, energy, spread, first, cross = online_sums(
            logits, class_weight, n64, inv_t, peer, teacher,
            K, C, STRIDES, READABLE, BLOCK_C, BLOCK_C, True, PEERS, TEMPERED, SMOOTHED, STATS,
            ARGMAX=STATS or GATE == "correct", PAIRS=ONLINE_PAIRS, LAST=not SECOND,
            STAGES=1,
        )  # fmt: skip

        # 5. Cross-entropy, entropy, and which peers are right.
        LSE, LSE_T, NLL, CORRECT, correct, ce, entropy = row_losses(
            logits, n64, y, labelled, fits, misfit, w_y, w_total, label_smoothing, inv_t,
            M, SUM, SUM_T, energy, spread, first, peer,
            K, C, STRIDES, PEERS, TEMPERED, SMOOTHED, STATS, GATE,
        )  # fmt: skip
        if STATS and NEED_GRAD:
            store_early_sums(partials, peer, ce_sums, ce, entropy_sums, entropy, correct_sums,
                             correct, mimics, K, LAYOUT)  # fmt: skip

        # 6. Which peers teach on this row, and the mixed teachers' normalisers.
        GATES = ()
        if GATED:
            GATES = open_gates(CORRECT, NLL, labelled, GATE, K)
        WEIGHT = ()
        DIVISOR = ()
        MIX_LSE = ()
        if MIXED:
            WEIGHT, DIVISOR = teacher_weights(peer_weights, GATES, K, EDGE, GATED)
        if TARGET == "ensemble_logits":
            MIX_LSE = mean_logits_normalisers(
                logits, n64, peer_weights, GATES, DIVISOR, inv_t, K, C, STRIDES, READABLE, BLOCK_C,
                EDGE, GATED,
            )  # fmt: skip

        # 7. Divergences that the gradients contain: kept in memory, since registers are few.
        pairs = tl.zeros((PEERS, PEERS), tl.float32)  # KL(q_l || q_k) at [l, k]
        KL = ()
        for k in tl.static_range(K):
            KL = KL + (tl.cast(0.0, tl.float32),)
        FORWARD = ()
        BACK = ()
        if ONLINE_PAIRS:
            pairs = pairs_of_sums(cross, SUM, SUM_T, LSE_T, teacher, student, is_pair,
                                  K, PEERS, TEMPERED)  # fmt: skip
        row_pairs = scratch + tl.program_id(0) * (3 * K * K)
        if VALUES_PASS:
            KL, FORWARD, BACK, toward, ratios = mixed_divergences(
                logits, n64, LSE_T, teacher, student, peer_weights, GATES, WEIGHT, DIVISOR, MIX_LSE,
                inv_t, K, C, STRIDES, READABLE, BLOCK_C, PEERS, EDGE, GATED, TEMPERED, TARGET,
                SYMMETRIC, TO_PEERS,
            )  # fmt: skip
            if TO_PEERS:
                tl.store(row_pairs + K * K + pair_at, toward, mask=is_pair)
                tl.store(row_pairs + 2 * K * K + pair_at, ratios, mask=is_pair)
        if COUPLED:
            if not MIXED:
                tl.store(row_pairs + pair_at, pairs, mask=is_pair)
            tl.debug_barrier()

        # 8. Second pass, backwards: what needs every normaliser, and the gradients.
        highest = tl.cast(-1.0, tl.float32)
        ensemble_class = tl.cast(0, tl.int32)
        if SECOND:
            if NEED_GRAD:
                # Where a term has no part it is selected away, not multiplied by 0: its factor, or
                # another peer in it, may be infinite or NaN.
                ce_row = tl.where(labelled, ce_factor, 0.0)
                kl_row = tl.where(mimics, kl_factor, 0.0)
                has_kl = mimics & (tl.where(kl_factor != 0.0, 1, 0) == 1)
                bad = tl.where(misfit, float("nan"), 0.0)
                UP = load_upstream(upstream, u_stride_k, u_stride_n, n64, K)
            for back in range(0, C, BLOCK_C):
                c = LAST_BLOCK - back + tl.arange(0, BLOCK_C)
                Z = load_peers(logits, n64, c, -BLOCK_C - back, K, C, STRIDES, READABLE, True)
                top, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
                if MIXED and not VALUES_PASS:
                    PART = mixed_kl(Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                                    K, EDGE, GATED, TARGET, SYMMETRIC)  # fmt: skip
                    NEW_KL = ()
                    for k in tl.static_range(K):
                        NEW_KL = NEW_KL + (KL[k] + times(WEIGHT[k], PART[k]),)
                    KL = NEW_KL
                if STATS:
                    if not ONLINE_PAIRS:
                        pairs = add_block_to_pairs(pairs, D, Q, teacher, K, PEERS, BLOCK_C)
                    highest, ensemble_class = ensemble_argmax(
                        Z, LSE, c, highest, ensemble_class, K, C, BLOCK_C
                    )
                if NEED_GRAD:
                    w_c = tl.where(c < C, 1.0, 0.0)
                    if class_weight is not None and SMOOTHED:
                        w_c = tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32)
                    for j in tl.static_range(K):
                        if TEMPERED:
                            p = tl.exp(Z[j] - LSE[j])
                        else:
                            p = Q[j]
                        g = ce_gradient(p, w_c, c, y, labelled, w_y, w_total, label_smoothing,
                                        ce_row, UP[j], C, SMOOTHED)  # fmt: skip
                        if COUPLED:
                            pull = coupled_pull(
                                j, Z, D, Q, top, row_pairs, peer_weights, GATES, WEIGHT, DIVISOR,
                                MIX_LSE, FORWARD, BACK, UP, inv_t, K, BLOCK_C, EDGE, GATED, TARGET,
                                SYMMETRIC, DETACH,
                            )  # fmt: skip
                            g += tl.where(has_kl, kl_row * pull, 0.0)
                        else:
                            slope = learning_from_mixture(
                                j, Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE, BACK, inv_t,
                                K, EDGE, GATED, TARGET, SYMMETRIC,
                            )  # fmt: skip
                            pull = times(WEIGHT[j], slope)
                            g += tl.where(has_kl, kl_row * UP[j] * pull, 0.0)
                        g += bad
                        tl.store(grads[j] + (row_start(n64, STRIDES[j][2], -BLOCK_C - back) + c),
                                 g.to(grads[j].dtype.element_ty), mask=c < C,
                                 eviction_policy="evict_first")  # fmt: skip

        # 9. The row's losses, and its part of the sums.
        kl = tl.zeros((PEERS,), tl.float32)
        if MIXED:
            for k in tl.static_range(K):
                kl = put(kl, k, KL[k], PEERS)
        else:
            kl = kl_of_pairs(pairs, peer_weights, GATES, K, EDGE, GATED, SYMMETRIC, PEERS)
        kl = tl.where(mimics, kl, 0.0)
        if REDUCTION == "none":
            loss = times(ce_weight, ce)
            loss += times(kl_weight * kl_scale, kl)
            tl.store(losses + n64 + tl.cast(N, tl.int64) * peer, loss, mask=peer < K)
        ce_sums += ce
        kl_sums += kl
        ce_count += tl.where(labelled, w_y, 0.0)
        labelled_rows += tl.where(labelled, 1.0, 0.0)
        if STATS:
            entropy_sums += tl.where(mimics, entropy, 0.0)
            correct_sums += tl.where(correct, 1.0, 0.0)
            ensemble_correct += tl.where(labelled & (ensemble_class == y), 1.0, 0.0)
            pair_sums += tl.where(mimics, pairs, 0.0)

    # 10. The last program to finish adds up all programs' sums.
    if REDUCTION != "none" or STATS:
        store_sums(
            partials, peer, is_pair, pair_at, ce_sums, kl_sums, ce_count, labelled_rows,
            entropy_sums, correct_sums, ensemble_correct, pair_sums, K, LAYOUT, STATS,
        )  # fmt: skip
    finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N, K, LAYOUT,
           PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS, sample_weight is not None)  # fmt: skip
