"""The loss where a gradient depends on more than the others' probabilities: the Jensen-Shannon
divergence, gradients into the teachers, other divergences than the forward one under gates or from
a mixed teacher, and target="ensemble_logits", a mean of logits.

A program takes one sample at a time, and a row may have any number of classes. The steps are those
of `wide_rows`; K is 2 or more. Gradients contain the divergences themselves, for example

    d KL(q_j || q_o) / d z_j = (1/T) q_j (log q_j - log q_o - KL(q_j || q_o)),

so that they must be known before the first gradient is written. KL divergences between two peers
come from the first pass, as a running sum for each ordered pair. Extra passes between the first and
the second:

- target="ensemble_logits": one for the normaliser of the mixed logits, which depends on which peers
  teach on the row;
- where the gradient contains the divergences of a mixed teacher t_k, a mean of probabilities or of
  logits, or of the mean m of two peers ("jsd"): one for these, as they take every normaliser.

So "jsd" is three reads and one write. All of it is O(K**2 C), and takes all the registers there
are: no block is loaded ahead.
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
from .divergences import divergence_of, log_ratios, student_slope, teacher_slope
from .mixed_teachers import (
    mean_logits_normalisers,
    mixed_block,
    mixed_divergences,
    mixed_kl,
    mixed_teacher,
    parts_slope,
    ratio_excess,
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
    peer_sums,
    read_label,
    row_losses,
    row_start,
    store_early_sums,
    store_soft_edges,
    store_sums,
    sum_class_weights,
    teacher_weights,
)

# ---- the Jensen-Shannon divergences of all pairs


@triton.jit
def ratios_of_pair(l: tl.constexpr, k: tl.constexpr, D,  # noqa: E741
                   K: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """`log_ratios` of teacher l and student k. With equal weights both orders have the same mean:
    of two peers they are written alike, so that the compiler has them once."""
    if BETA == 0.5 and K == 2 and l > k:
        of_student, of_teacher = log_ratios(D[k] - D[l], BETA)
    else:
        of_teacher, of_student = log_ratios(D[l] - D[k], BETA)
    return of_teacher, of_student


@triton.jit
def add_block_to_jsd(ahead, back, D, Q, teacher, K: tl.constexpr, PEERS: tl.constexpr,
                     BLOCK_C: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """Adds a block's share of KL(q_l || m) and KL(q_k || m) of teacher l and student k at [l, k],
    where m is their mean. With equal weights `back` is `ahead` with the places of l and k changed,
    and left out."""
    for l in tl.static_range(K):  # noqa: E741
        AHEAD = ()
        BACK = ()
        for k in tl.static_range(K):
            if l != k:
                of_teacher, of_student = ratios_of_pair(l, k, D, K, BETA)
                AHEAD = AHEAD + (times(Q[l], of_teacher),)
                BACK = BACK + (times(Q[k], of_student),)
            else:
                AHEAD = AHEAD + (tl.zeros((BLOCK_C,), tl.float32),)
                BACK = BACK + (tl.zeros((BLOCK_C,), tl.float32),)
        ahead += tl.where(teacher == l, peer_sums(AHEAD, K, PEERS, BLOCK_C)[None, :], 0.0)
        if BETA != 0.5:
            back += tl.where(teacher == l, peer_sums(BACK, K, PEERS, BLOCK_C)[None, :], 0.0)
    return ahead, back


@triton.jit
def jsd_of_pairs(logits, n64, LSE_T, teacher, inv_t,
                 K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr, READABLE: tl.constexpr,
                 BLOCK_C: tl.constexpr, PEERS: tl.constexpr, TEMPERED: tl.constexpr,
                 BETA: tl.constexpr):  # fmt: skip
    """One pass over the row for what the gradients contain: the sums of `add_block_to_jsd`."""
    ahead = tl.zeros((PEERS, PEERS), tl.float32)
    back = tl.zeros((PEERS, PEERS), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, False)
        _, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
        ahead, back = add_block_to_jsd(ahead, back, D, Q, teacher, K, PEERS, BLOCK_C, BETA)
    return ahead, back


# ---- a block of the KL gradient with respect to peer j's z / T. What it contains of the row's
# divergences lies in `row_pairs`, this program's (3, K, K), each at [teacher l, student k]:
# KL(q_l || q_k), with "jsd" KL(q_l || m) and, unless weights are equal, KL(q_k || m); `toward` and
# `ratios` of a mixed teacher have the second and third place.


@triton.jit
def learning_from_peer(j: tl.constexpr, o: tl.constexpr, D, Q, row_pairs, K: tl.constexpr,
                       DIVERGENCE: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """The gradient of student j's divergence from teacher o through j's own prediction."""
    back = tl.cast(0.0, tl.float32)
    if DIVERGENCE == "jsd" and BETA != 0.5:
        back = tl.load(row_pairs + K * K + o * K + j)
    elif DIVERGENCE != "forward":
        back = tl.load(row_pairs + j * K + o)
    return student_slope(Q[o], Q[j], D[o] - D[j], back, DIVERGENCE, BETA)


@triton.jit
def teaching_peer(j: tl.constexpr, o: tl.constexpr, D, Q, row_pairs, K: tl.constexpr,
                  DIVERGENCE: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """The gradient of student o's divergence from teacher j through j's prediction as teacher."""
    ahead = tl.cast(0.0, tl.float32)
    if DIVERGENCE != "reverse":
        ahead = tl.load(row_pairs + j * K + o)
    return teacher_slope(Q[j], Q[o], D[j] - D[o], ahead, DIVERGENCE, BETA)


@triton.jit
def learning_from_mixture(j: tl.constexpr, Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE,
                          BACK, inv_t, K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                          TARGET: tl.constexpr, DIVERGENCE: tl.constexpr,
                          BETA: tl.constexpr):  # fmt: skip
    """The gradient of student j's divergence from its mixed teacher through j's own prediction."""
    gap, t = mixed_teacher(j, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                           K, EDGE, GATED, TARGET, DIVERGENCE)  # fmt: skip
    return student_slope(t, Q[j], gap - D[j], BACK[j], DIVERGENCE, BETA)


@triton.jit
def teaching_mixture(j: tl.constexpr, o: tl.constexpr, Z, D, Q, top, row_pairs, peer_weights, GATES,
                     DIVISOR, MIX_LSE, AHEAD, inv_t,
                     K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                     TARGET: tl.constexpr, DIVERGENCE: tl.constexpr,
                     BETA: tl.constexpr):  # fmt: skip
    """The gradient of student o's divergence from its mixed teacher through peer j's part in it."""
    gap, t = mixed_teacher(o, Z, D, top, peer_weights, GATES, DIVISOR, MIX_LSE, inv_t,
                           K, EDGE, GATED, TARGET, DIVERGENCE)  # fmt: skip
    if TARGET == "ensemble":
        ahead = tl.zeros_like(gap)
        if DIVERGENCE != "reverse":
            toward = tl.load(row_pairs + K * K + j * K + o)
            ahead = parts_slope(Q[j], gap, D[o], DIVERGENCE, BETA) - times(Q[j], toward)
        back = tl.zeros_like(gap)
        if DIVERGENCE == "reverse" or DIVERGENCE == "jeffreys":
            ratios = tl.load(row_pairs + 2 * K * K + j * K + o)
            back = times(Q[j], ratios) - ratio_excess(Q[o] - t, D[j] - gap)
        slope = divergence_of(ahead, back, DIVERGENCE, BETA)
    else:
        slope = teacher_slope(t, Q[o], gap - D[o], AHEAD[o], DIVERGENCE, BETA)
    return slope


@triton.jit
def coupled_pull(j: tl.constexpr, Z, D, Q, top, row_pairs, peer_weights, GATES, WEIGHT, DIVISOR,
                 MIX_LSE, AHEAD, BACK, UP, inv_t,
                 K: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                 TARGET: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr,
                 DETACH: tl.constexpr):  # fmt: skip
    """The KL gradient for peer j: the sum of the terms above over all students, each multiplied by
    its loss's upstream gradient UP."""
    pull = tl.zeros((BLOCK_C,), tl.float32)
    if TARGET != "peers":
        slope = learning_from_mixture(j, Z, D, Q, top, peer_weights, GATES, DIVISOR, MIX_LSE, BACK,
                                      inv_t, K, EDGE, GATED, TARGET, DIVERGENCE,
                                      BETA)  # fmt: skip
        pull += times(UP[j] * WEIGHT[j], slope)
    for o in tl.static_range(K):
        if o != j:
            if TARGET == "peers":
                w = edge(j, o, peer_weights, GATES, K, EDGE, GATED)
                slope = learning_from_peer(j, o, D, Q, row_pairs, K, DIVERGENCE, BETA)
                pull += times(UP[j] * w, slope)
            if not DETACH:
                w = edge(o, j, peer_weights, GATES, K, EDGE, GATED)
                if TARGET == "peers":
                    slope = teaching_peer(j, o, D, Q, row_pairs, K, DIVERGENCE, BETA)
                else:
                    slope = teaching_mixture(j, o, Z, D, Q, top, row_pairs, peer_weights, GATES,
                                             DIVISOR, MIX_LSE, AHEAD, inv_t, K, EDGE, GATED,
                                             TARGET, DIVERGENCE, BETA)  # fmt: skip
                pull += times(UP[o] * w, slope)
    return pull


@triton.jit(
    do_not_specialize=["N", "ignore_index", "label_stride", "u_stride_k", "u_stride_n"],
    do_not_specialize_on_alignment=SINGLE_READS,
)
def coupled_rows(
    logits,  # K pointers (N, C)
    grads,  # a pointer (N, C) for each of STUDENTS, () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K), or None
    class_weight,  # (C,), or None
    sample_weight,  # (N,), or None
    upstream,  # the losses' own gradient, (K,) or (K, N) by its strides, or None for 1
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # packed statistics, float32
    partials,  # (programs, their size) float32
    scratch,  # (programs, 3, K, K) float32: `row_pairs`; one K x K more for a soft gate's edges
    counter,  # (1,) int32, zero before and after
    counts,  # (2,) float32, (3,) with sample_weight: `count_rows` of an earlier launch, or None
    N, label_stride, ignore_index, u_stride_k, u_stride_n,
    ce_weight, kl_weight, temperature, label_smoothing,
    K: tl.constexpr, C: tl.constexpr,
    STRIDES: tl.constexpr,  # per peer: logits row, logits column, gradient row
    READABLE: tl.constexpr,  # per peer: columns that may be read, C or more
    BLOCK_C: tl.constexpr, PEERS: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
    LANE: tl.constexpr, ADJACENT: tl.constexpr,  # see online_sums
    LAYOUT: tl.constexpr,  # a StatsLayout: of the statistics, and of a program's sums
    NEED_GRAD: tl.constexpr, STATS: tl.constexpr, REDUCTION: tl.constexpr,
    STUDENTS: tl.constexpr,  # the peers whose gradients are wanted
    TARGET: tl.constexpr, GATE: tl.constexpr, EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr, JSD_BETA: tl.constexpr, DETACH: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes samples b, b + programs, ..."""
    MIXED: tl.constexpr = TARGET != "peers"
    JSD: tl.constexpr = DIVERGENCE == "jsd" and not MIXED  # of two peers
    SOFT: tl.constexpr = GATE == "confidence" or GATE == "entropy"
    GATED: tl.constexpr = GATE != "none" and not SOFT
    ENTROPY: tl.constexpr = STATS or GATE == "entropy"
    # whether the gradient contains divergences; else the teacher is a constant mean of logits
    COUPLED: tl.constexpr = NEED_GRAD and (DIVERGENCE != "forward" or not DETACH)
    SECOND: tl.constexpr = NEED_GRAD or STATS or MIXED or JSD  # whether there is a second pass
    ONLINE_PAIRS: tl.constexpr = not MIXED and not JSD and (COUPLED or not SECOND)
    # as in `mean_logits_normalisers`, so that identical peers have normalisers that are identical
    ONE_LANE: tl.constexpr = ONLINE_PAIRS or TARGET == "ensemble_logits"
    TO_PEERS: tl.constexpr = TARGET == "ensemble" and not DETACH
    COUNT_ALL: tl.constexpr = (sample_weight is not None) and MIMIC_IGNORED
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
    all_rows = tl.cast(0.0, tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        n64 = tl.cast(n, tl.int64)

        # 3. The row's label and weight.
        y, labelled, fits, misfit, mimics, w_y, w_row = read_label(
            labels, label_stride, ignore_index, class_weight, sample_weight, n64, C, MIMIC_IGNORED
        )

        # 4. [online softmax] First pass: maxima and normalisers, divergences of single peers.
        M, SUM, SUM_T, energy, spread, first, _, cross = online_sums(
            logits, class_weight, None, n64, inv_t, peer, teacher,
            K, C, STRIDES, READABLE, BLOCK_C, BLOCK_C if ONE_LANE else LANE, ADJACENT, PEERS,
            TEMPERED, SMOOTHED, ENTROPY, ARGMAX=STATS or GATE == "correct", PAIRS=ONLINE_PAIRS,
            REVERSE=False, LAST=not SECOND, STAGES=1,
        )  # fmt: skip

        # 5. Cross-entropy, entropy, and which peers are right.
        LSE, LSE_T, NLL, CORRECT, correct, ce, entropy = row_losses(
            logits, n64, y, labelled, fits, misfit, w_y, w_total, label_smoothing, inv_t,
            M, SUM, SUM_T, energy, spread, first, peer,
            K, C, STRIDES, PEERS, TEMPERED, SMOOTHED, STATS, GATE,
        )  # fmt: skip
        ce *= w_row
        if STATS and NEED_GRAD:
            store_early_sums(partials, peer, ce_sums, ce, entropy_sums, entropy, correct_sums,
                             correct, mimics, w_row, K, LAYOUT)  # fmt: skip

        # 6. Which peers teach on this row, and the mixed teachers' normalisers.
        row_pairs = scratch + tl.program_id(0) * ((4 if SOFT else 3) * K * K)
        GATES = ()
        weights = peer_weights
        if GATED:
            GATES = open_gates(CORRECT, NLL, labelled, GATE, K)
        if SOFT:
            weights = row_pairs + 3 * K * K
            store_soft_edges(weights, NLL, entropy, labelled, peer, peer_weights, K, EDGE, GATE)
        WEIGHT = ()
        DIVISOR = ()
        MIX_LSE = ()
        if MIXED:
            WEIGHT, DIVISOR = teacher_weights(weights, GATES, K, EDGE, GATED)
        if TARGET == "ensemble_logits":
            MIX_LSE = mean_logits_normalisers(
                logits, n64, weights, GATES, DIVISOR, inv_t, K, C, STRIDES, READABLE, BLOCK_C,
                EDGE, GATED,
            )  # fmt: skip

        # 7. Divergences that the gradients contain: kept in memory, since registers are few.
        pairs = tl.zeros((PEERS, PEERS), tl.float32)  # KL(q_l || q_k) at [l, k]
        ahead = tl.zeros((PEERS, PEERS), tl.float32)  # with "jsd" KL(q_l || m) there
        back = tl.zeros((PEERS, PEERS), tl.float32)  # and KL(q_k || m)
        AHEAD = ()  # the same of mixed teachers
        KL = ()
        for k in tl.static_range(K):
            AHEAD = AHEAD + (tl.cast(0.0, tl.float32),)
            KL = KL + (tl.cast(0.0, tl.float32),)
        BACK = AHEAD
        if ONLINE_PAIRS:
            pairs = pairs_of_sums(cross, SUM, SUM_T, LSE_T, teacher, student, is_pair,
                                  K, PEERS, TEMPERED)  # fmt: skip
            if COUPLED:
                tl.store(row_pairs + pair_at, pairs, mask=is_pair)
        if COUPLED and MIXED:
            AHEAD, BACK, toward, ratios = mixed_divergences(
                logits, n64, LSE_T, teacher, student, weights, GATES, DIVISOR, MIX_LSE, inv_t,
                K, C, STRIDES, READABLE, BLOCK_C, PEERS, EDGE, GATED, TEMPERED, TARGET,
                DIVERGENCE, JSD_BETA, TO_PEERS,
            )  # fmt: skip
            KL = mixed_kl(AHEAD, BACK, WEIGHT, K, DIVERGENCE, JSD_BETA)
            if TO_PEERS:
                tl.store(row_pairs + K * K + pair_at, toward, mask=is_pair)
                tl.store(row_pairs + 2 * K * K + pair_at, ratios, mask=is_pair)
        if COUPLED and JSD:
            ahead, back = jsd_of_pairs(logits, n64, LSE_T, teacher, inv_t, K, C, STRIDES, READABLE,
                                       BLOCK_C, PEERS, TEMPERED, JSD_BETA)  # fmt: skip
            tl.store(row_pairs + pair_at, ahead, mask=is_pair)
            if JSD_BETA != 0.5:
                tl.store(row_pairs + K * K + pair_at, back, mask=is_pair)
        if COUPLED:
            tl.debug_barrier()

        # 8. Second pass, backwards: what needs every normaliser, and the gradients.
        highest = tl.cast(-1.0, tl.float32)
        ensemble_class = tl.cast(0, tl.int32)
        if SECOND:
            if NEED_GRAD:
                # Where a term has no part it is selected away, not multiplied by 0: its factor, or
                # another peer in it, may be infinite or NaN.
                ce_row = tl.where(labelled, ce_factor * w_row, 0.0)
                kl_row = tl.where(mimics, kl_factor * w_row, 0.0)
                has_kl = mimics & (tl.where(kl_factor != 0.0, 1, 0) == 1)
                bad = tl.where(misfit, float("nan"), 0.0)
                UP = load_upstream(upstream, u_stride_k, u_stride_n, n64, K)
            for behind in range(0, C, BLOCK_C):
                c = LAST_BLOCK - behind + tl.arange(0, BLOCK_C)
                Z = load_peers(logits, n64, c, -BLOCK_C - behind, K, C, STRIDES, READABLE, True)
                top, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
                if MIXED and not COUPLED:
                    PART = mixed_block(Z, D, Q, top, weights, GATES, DIVISOR, MIX_LSE, inv_t,
                                       K, EDGE, GATED, TARGET, DIVERGENCE, JSD_BETA)  # fmt: skip
                    NEW_KL = ()
                    for k in tl.static_range(K):
                        NEW_KL = NEW_KL + (KL[k] + times(WEIGHT[k], PART[k]),)
                    KL = NEW_KL
                if JSD and not COUPLED:
                    ahead, back = add_block_to_jsd(ahead, back, D, Q, teacher, K, PEERS, BLOCK_C,
                                                   JSD_BETA)  # fmt: skip
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
                    for i in tl.static_range(len(grads)):
                        if TEMPERED:
                            p = tl.exp(Z[STUDENTS[i]] - LSE[STUDENTS[i]])
                        else:
                            p = Q[STUDENTS[i]]
                        up = UP[STUDENTS[i]]
                        g = ce_gradient(p, w_c, c, y, labelled, w_y, w_total, label_smoothing,
                                        ce_row, up, C, SMOOTHED)  # fmt: skip
                        pull = coupled_pull(
                            STUDENTS[i], Z, D, Q, top, row_pairs, weights, GATES, WEIGHT, DIVISOR,
                            MIX_LSE, AHEAD, BACK, UP, inv_t, K, BLOCK_C, EDGE, GATED, TARGET,
                            DIVERGENCE, JSD_BETA, DETACH,
                        )  # fmt: skip
                        g += tl.where(has_kl, kl_row * pull, 0.0)
                        g += bad
                        start = row_start(n64, STRIDES[STUDENTS[i]][2], -BLOCK_C - behind)
                        tl.store(grads[i] + (start + c), g.to(grads[i].dtype.element_ty),
                                 mask=c < C, eviction_policy="evict_first")  # fmt: skip

        # 9. The row's losses, and its part of the sums.
        kl = tl.zeros((PEERS,), tl.float32)
        if MIXED:
            for k in tl.static_range(K):
                kl = put(kl, k, KL[k], PEERS)
        elif JSD and JSD_BETA == 0.5:
            kl = kl_of_pairs(ahead, weights, GATES, K, EDGE, GATED, "jeffreys", PEERS)
        elif JSD:
            values = divergence_of(ahead, back, DIVERGENCE, JSD_BETA)
            kl = kl_of_pairs(values, weights, GATES, K, EDGE, GATED, "forward", PEERS)
        else:
            kl = kl_of_pairs(pairs, weights, GATES, K, EDGE, GATED, DIVERGENCE, PEERS)
        kl = tl.where(mimics, kl, 0.0) * w_row
        if REDUCTION == "none":
            loss = times(ce_weight, ce)
            loss += times(kl_weight * kl_scale, kl)
            tl.store(losses + n64 + tl.cast(N, tl.int64) * peer, loss, mask=peer < K)
        ce_sums += ce
        kl_sums += kl
        ce_count += tl.where(labelled, w_y * w_row, 0.0)
        labelled_rows += tl.where(labelled, w_row, 0.0)
        if STATS:
            entropy_sums += tl.where(mimics, entropy, 0.0) * w_row
            correct_sums += tl.where(correct, w_row, 0.0)
            ensemble_correct += tl.where(labelled & (ensemble_class == y), w_row, 0.0)
            pair_sums += tl.where(mimics, pairs, 0.0) * w_row
        if COUNT_ALL:
            all_rows += w_row

    # 10. The last program to finish adds up all programs' sums.
    if REDUCTION != "none" or STATS:
        store_sums(
            partials, peer, is_pair, pair_at, ce_sums, kl_sums, ce_count, labelled_rows,
            entropy_sums, correct_sums, ensemble_correct, pair_sums, all_rows, K, LAYOUT, STATS,
            COUNT_ALL,
        )  # fmt: skip
    finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N, K, LAYOUT,
           PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS,
           sample_weight is not None)  # fmt: skip
