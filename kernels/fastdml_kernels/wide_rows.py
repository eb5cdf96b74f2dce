"""Loss, statistics and gradients for rows of any length, a block of classes at a time; teachers are
constants.

A program takes one sample. Its first pass over the K rows is an online softmax: running maximum and
running sums, rescaled as the maximum grows. Without a gradient that pass is all the plain loss
needs: one read. With one, a second pass walks the row backwards, so that it begins with what the
cache still holds, and writes each student's gradient once: two reads, one write. target="ensemble"
and statistics take the second read without a gradient too, since a mean of probabilities needs
every peer's normaliser first.

Distillation is two peers of which one is a student, and the passes are the same. The reverse
divergence takes no more of them than the forward one: its gradient contains its value, but that is
an expectation under the student's own prediction, so that the first pass has it in one running sum
a student. Jeffreys' divergence has that sum, and the forward one's from the second pass.

Without a second pass the forward KL terms are summed before the normalisers are known, so that each
ordered pair of peers needs its own running sum, O(K**2 C). Statistics, gates, edge weights and the
reverse divergence cost as much. All else is O(K C).

`coupled_rows` is the kernel for the Jensen-Shannon divergence, for others than the forward one
under gates or a mixed teacher, for gradients into the teachers, and for a mean of logits. Both are
made of the steps in `wide_functions` and `online_softmax`; notation as there.
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
from .divergences import divergence_of, student_slope
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
    mean_probability,
    pairs_of_sums,
    read_label,
    reverse_of_sums,
    row_losses,
    row_start,
    store_early_sums,
    store_soft_edges,
    store_sums,
    sum_class_weights,
    teacher_weights,
)


@triton.jit
def kl_terms(D, Q, top, DIVISOR, peer_weights, GATES,
             K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr, UNIFORM: tl.constexpr,
             TARGET: tl.constexpr):  # fmt: skip
    """One block's share of each student's forward KL term, edge weights included; of its divergence
    from the mixed teacher with target "ensemble".

    Without weights and gates (UNIFORM) all students share the sums over the teachers of q_l and of
    q_l d_l: sum_l q_l (d_l - d_k), whose term l = k is 0."""
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
                gap = mean_probability(k, D, peer_weights, GATES, DIVISOR[k], K, EDGE, GATED, False)
                t = tl.exp(gap + top)
                total = tl.sum(times(t, gap - D[k]), axis=0)
            OUT = OUT + (total,)
    return OUT


@triton.jit
def pull_towards_teachers(k: tl.constexpr, D, Q, away, BACK, peer_weights, GATES,
                          K: tl.constexpr, EDGE: tl.constexpr, GATED: tl.constexpr,
                          UNIFORM: tl.constexpr, DIVERGENCE: tl.constexpr,
                          BLOCK_C: tl.constexpr):  # fmt: skip
    """A block of student k's KL gradient, with respect to z / T. The forward one's is
    sum_l w_kl (q_k - q_l), where the weights are equal (UNIFORM) from `away`, the sum of all
    q_l - q_0; the reverse one's is linear in d_l - d_k, and contains its value BACK."""
    forward = tl.zeros((BLOCK_C,), tl.float32)
    if DIVERGENCE != "reverse":
        if UNIFORM:
            forward = (K * (Q[k] - Q[0]) - away) * EDGE
        else:
            for l in tl.static_range(K):  # noqa: E741
                if l != k:
                    w = edge(k, l, peer_weights, GATES, K, EDGE, GATED)
                    forward += times(w, Q[k] - Q[l])
    reverse = forward
    if DIVERGENCE != "forward":
        gap = tl.zeros((BLOCK_C,), tl.float32)
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w = edge(k, l, peer_weights, GATES, K, EDGE, GATED)
                gap += times(w, D[l] - D[k])
        reverse = student_slope(Q[k], Q[k], gap, BACK[k], "reverse", 0.5)
    return divergence_of(forward, reverse, DIVERGENCE, 0.5)


@triton.jit(
    do_not_specialize=["N", "ignore_index", "label_stride", "u_stride_k", "u_stride_n"],
    do_not_specialize_on_alignment=SINGLE_READS,
)
def wide_rows(
    logits,  # K pointers (N, C)
    grads,  # a pointer (N, C) for each of STUDENTS, () without NEED_GRAD
    labels,  # (N,) int64 or int32
    peer_weights,  # (K, K), or None
    class_weight,  # (C,), or None
    sample_weight,  # (N,), or None
    upstream,  # the losses' own gradient, (K,) or (K, N) by its strides, or None for 1
    counter,  # (1,) int32, zero before and after
    losses,  # (K,), or (K, N) with REDUCTION "none"
    stats,  # packed statistics, float32
    partials,  # (programs, their size) float32
    scratch,  # (programs, K, K) float32 for the edges under a soft gate, or None
    counts,  # (2,) float32, (3,) with sample_weight: `count_rows` of an earlier launch, or None
    N, label_stride, ignore_index, u_stride_k, u_stride_n,
    ce_weight, kl_weight, temperature, label_smoothing,
    K: tl.constexpr, C: tl.constexpr,
    STRIDES: tl.constexpr,  # per peer: logits row, logits column, gradient row
    READABLE: tl.constexpr,  # per peer: columns that may be read, C or more
    BLOCK_C: tl.constexpr, PEERS: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
    LANE: tl.constexpr, ADJACENT: tl.constexpr,  # see online_sums
    STAGES: tl.constexpr, BACK_STAGES: tl.constexpr,  # blocks loaded at once in each of the passes
    LAYOUT: tl.constexpr,  # a StatsLayout: of the statistics, and of a program's sums
    NEED_GRAD: tl.constexpr, STATS: tl.constexpr, REDUCTION: tl.constexpr,
    STUDENTS: tl.constexpr,  # the peers whose gradients are wanted
    TARGET: tl.constexpr,  # "peers" or "ensemble"
    DIVERGENCE: tl.constexpr,  # with "ensemble" and with gates "forward"
    GATE: tl.constexpr, EDGE: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
    CE_POINTER: tl.constexpr, KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs; program b takes samples b, b + programs, ..."""
    MUTUAL: tl.constexpr = K > 1
    MIXED: tl.constexpr = MUTUAL and TARGET == "ensemble"
    SOFT: tl.constexpr = GATE == "confidence" or GATE == "entropy"
    GATED: tl.constexpr = GATE != "none" and not SOFT
    UNIFORM: tl.constexpr = (peer_weights is None) and GATE == "none"
    ENTROPY: tl.constexpr = STATS or GATE == "entropy"
    SECOND: tl.constexpr = NEED_GRAD or STATS or MIXED  # whether there is a second pass
    ONLINE_PAIRS: tl.constexpr = MUTUAL and DIVERGENCE != "reverse" and not SECOND
    # KL terms come of the divergences of all pairs where these are computed anyway.
    FROM_PAIRS: tl.constexpr = ONLINE_PAIRS or (
        MUTUAL and DIVERGENCE != "reverse" and not MIXED and STATS
    )
    REVERSED: tl.constexpr = MUTUAL and (
        DIVERGENCE == "reverse" or (DIVERGENCE == "jeffreys" and NEED_GRAD)
    )
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

        # 4. [online softmax] First pass: maxima and normalisers.
        M, SUM, SUM_T, energy, spread, first, GAP, cross = online_sums(
            logits, class_weight, peer_weights, n64, inv_t, peer, teacher,
            K, C, STRIDES, READABLE, BLOCK_C, BLOCK_C if ONLINE_PAIRS else LANE, ADJACENT, PEERS,
            TEMPERED, SMOOTHED, ENTROPY, ARGMAX=STATS or GATE == "correct", PAIRS=ONLINE_PAIRS,
            REVERSE=REVERSED, LAST=not SECOND, STAGES=STAGES,
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

        # 6. Which peers teach on this row, and the KL terms that the first pass gives.
        GATES = ()
        weights = peer_weights
        if GATED:
            GATES = open_gates(CORRECT, NLL, labelled, GATE, K)
        if SOFT:
            weights = scratch + tl.program_id(0) * (K * K)
            store_soft_edges(weights, NLL, entropy, labelled, peer, peer_weights, K, EDGE, GATE)
        WEIGHT = ()
        DIVISOR = ()
        if MIXED:
            WEIGHT, DIVISOR = teacher_weights(weights, GATES, K, EDGE, GATED)
        pairs = tl.zeros((PEERS, PEERS), tl.float32)  # KL(q_l || q_k) at [l, k]
        if ONLINE_PAIRS:
            pairs = pairs_of_sums(cross, SUM, SUM_T, LSE_T, teacher, student, is_pair,
                                  K, PEERS, TEMPERED)  # fmt: skip
        KL = ()
        for k in tl.static_range(K):
            KL = KL + (tl.cast(0.0, tl.float32),)
        BACK = ()
        if REVERSED:
            BACK = reverse_of_sums(GAP, SUM, SUM_T, LSE_T, peer_weights, inv_t, K, EDGE,
                                   TEMPERED)  # fmt: skip

        # 7. Second pass, backwards: what needs every normaliser, and the gradients.
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
            for back in tl.range(0, C, BLOCK_C, num_stages=BACK_STAGES):
                c = LAST_BLOCK - back + tl.arange(0, BLOCK_C)
                Z = load_peers(logits, n64, c, -BLOCK_C - back, K, C, STRIDES, READABLE, True)
                if MUTUAL:
                    top, D, Q = log_probabilities(Z, LSE_T, inv_t, K, TEMPERED)
                    if DIVERGENCE != "reverse" and not FROM_PAIRS:
                        PART = kl_terms(D, Q, top, DIVISOR, weights, GATES, K, EDGE, GATED, UNIFORM,
                                        TARGET)  # fmt: skip
                        NEW_KL = ()
                        for k in tl.static_range(K):
                            if MIXED:
                                NEW_KL = NEW_KL + (KL[k] + times(WEIGHT[k], PART[k]),)
                            else:
                                NEW_KL = NEW_KL + (KL[k] + PART[k],)
                        KL = NEW_KL
                    if STATS:
                        pairs = add_block_to_pairs(pairs, D, Q, teacher, K, PEERS, BLOCK_C)
                if STATS:
                    highest, ensemble_class = ensemble_argmax(
                        Z, LSE, c, highest, ensemble_class, K, C, BLOCK_C
                    )
                if NEED_GRAD:
                    w_c = tl.where(c < C, 1.0, 0.0)
                    if class_weight is not None and SMOOTHED:
                        w_c = tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32)
                    away = tl.zeros((BLOCK_C,), tl.float32)
                    if MUTUAL and UNIFORM:
                        for k in tl.static_range(1, K):
                            away += Q[k] - Q[0]
                    for i in tl.static_range(len(grads)):
                        if MUTUAL and not TEMPERED:
                            p = Q[STUDENTS[i]]
                        else:
                            p = tl.exp(Z[STUDENTS[i]] - LSE[STUDENTS[i]])
                        up = UP[STUDENTS[i]]
                        g = ce_gradient(p, w_c, c, y, labelled, w_y, w_total, label_smoothing,
                                        ce_row, up, C, SMOOTHED)  # fmt: skip
                        if MUTUAL:
                            pull = pull_towards_teachers(
                                STUDENTS[i], D, Q, away, BACK, weights, GATES,
                                K, EDGE, GATED, UNIFORM, DIVERGENCE, BLOCK_C,
                            )  # fmt: skip
                            g += tl.where(has_kl, kl_row * up * pull, 0.0)
                        g += bad
                        start = row_start(n64, STRIDES[STUDENTS[i]][2], -BLOCK_C - back)
                        tl.store(grads[i] + (start + c), g.to(grads[i].dtype.element_ty),
                                 mask=c < C, eviction_policy="evict_first")  # fmt: skip

        # 8. The row's losses, and its part of the sums.
        kl = tl.zeros((PEERS,), tl.float32)
        if FROM_PAIRS:
            kl = kl_of_pairs(pairs, weights, GATES, K, EDGE, GATED, DIVERGENCE, PEERS)
        else:
            for k in tl.static_range(K):
                if REVERSED:
                    kl = put(kl, k, divergence_of(KL[k], BACK[k], DIVERGENCE, 0.5), PEERS)
                else:
                    kl = put(kl, k, KL[k], PEERS)
        kl = tl.where(mimics, kl, 0.0) * w_row
        if REDUCTION == "none":
            loss = times(ce_weight, ce)
            if MUTUAL:
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

    # 9. The last program to finish adds up all programs' sums.
    if REDUCTION != "none" or STATS:
        store_sums(
            partials, peer, is_pair, pair_at, ce_sums, kl_sums, ce_count, labelled_rows,
            entropy_sums, correct_sums, ensemble_correct, pair_sums, all_rows, K, LAYOUT, STATS,
            COUNT_ALL,
        )  # fmt: skip
    finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N, K, LAYOUT,
           PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS,
           sample_weight is not None)  # fmt: skip
