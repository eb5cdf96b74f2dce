"""Device functions that several loss kernels call: the terms' weights, products in which 0 wins,
counts of labels, gates, and the sum over all programs that the last one to finish takes."""

from __future__ import annotations

import triton
import triton.language as tl

# Pointers to numbers that are read one at a time. Whether they are aligned to 16 bytes changes
# nothing in the code, but Triton would compile another kernel for it unless told not to.
SINGLE_READS = [
    "labels", "peer_weights", "sample_weight", "upstream", "counts", "ce_weight", "kl_weight",
    "temperature",
]  # fmt: skip


@triton.jit
def scalar(x, IS_POINTER: tl.constexpr):
    """A float32 that came as a number or as a 0-d tensor."""
    if IS_POINTER:  # no early return: Triton compiles what follows one all the same
        value = tl.load(x)
    else:
        value = x
    return tl.cast(value, tl.float32)


@triton.jit
def times(q, gap):
    """q * gap, where a factor of 0 (a class without probability, no edge, a term left out) gives 0,
    never 0 * inf or 0 * NaN."""
    return tl.where(q == 0.0, 0.0, q * gap)


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before anything is added to it. A compiler left to choose fuses the product
    with a difference that it goes into: a b - a b is then one product's rounding error, not 0."""
    return tl.fma(a, b, 0.0)  # fused already; of +0, as a compiler makes a product of a sum with -0


@triton.jit
def log_probability(z, inv_t, lse, TEMPERED: tl.constexpr):
    """log softmax(z / T) from its normaliser. Product and sum are fused by name: a compiler left
    to choose may fuse them for one peer and not for another, and identical peers then differ."""
    if TEMPERED:
        return tl.fma(z, inv_t, -lse)
    return z - lse


@triton.jit
def log_mean(total, weight):
    """log(total / weight), 0 where they are equal: a GPU's quotient of equal numbers need not be 1,
    as it multiplies by an approximate reciprocal."""
    return tl.log(total) - tl.log(weight)


@triton.jit
def joined(T, HALF: tl.constexpr):
    """2 * HALF tensors, each of the first half beside one of the second."""
    OUT = ()
    for k in tl.static_range(HALF):
        OUT = OUT + (tl.join(T[k], T[k + HALF]),)
    return OUT


@triton.jit
def parted(T, HALF: tl.constexpr):
    """What `joined` put together: the 2 * HALF tensors of HALF joined ones."""
    FIRST = ()
    SECOND = ()
    for k in tl.static_range(HALF):
        one, other = tl.split(T[k])
        FIRST = FIRST + (one,)
        SECOND = SECOND + (other,)
    return FIRST + SECOND


@triton.jit
def put(packed, position: tl.constexpr, value, S: tl.constexpr):
    """`packed` with `value` added at one position. A program keeps its S sums in one tensor (S,)
    spread over its threads, because S scalars would take S registers in every thread."""
    return packed + tl.where(tl.arange(0, S) == position, value, 0.0)


@triton.jit
def count_rows(labels, label_stride, class_weight, sample_weight, N, ignore_index,
               C: tl.constexpr):  # fmt: skip
    """(sum of the labelled rows' class weights, number of labelled rows, number of all rows) over
    all N labels. With `sample_weight` a row of weight w counts w times in each of them."""
    BLOCK: tl.constexpr = 1024
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    rows = tl.zeros((BLOCK,), tl.float32)
    all_rows = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        y = tl.load(labels + n.to(tl.int64) * label_stride, mask=n < N, other=ignore_index)
        labelled = y != ignore_index
        w_n = 1.0
        if sample_weight is not None:
            w_n = tl.load(sample_weight + n.to(tl.int64), mask=n < N, other=0.0).to(tl.float32)
            all_rows += w_n
        rows += tl.where(labelled, w_n, 0.0)
        if class_weight is not None:
            known = labelled & (y >= 0) & (y < C)
            w_y = tl.load(class_weight + y, mask=known, other=0.0).to(tl.float32)
            if sample_weight is not None:
                w_y *= w_n
            weight_sum += w_y
    count = tl.sum(rows, axis=0)
    if class_weight is not None:
        return tl.sum(weight_sum, axis=0), count, tl.sum(all_rows, axis=0)
    return count, count, tl.sum(all_rows, axis=0)


@triton.jit
def inverse(count):
    """1 / count, and 0 where nothing was counted: no row then has a gradient."""
    return tl.where(count > 0, 1.0 / tl.maximum(count, 1e-37), 0.0)


@triton.jit
def loss_weights(ce_weight, kl_weight, temperature, CE_POINTER: tl.constexpr,
                 KL_POINTER: tl.constexpr, T_POINTER: tl.constexpr,
                 TEMPERED: tl.constexpr):  # fmt: skip
    """ce_weight, kl_weight, 1 / T and T**2 in float32."""
    inv_t = 1.0
    kl_scale = 1.0
    if TEMPERED:
        t = scalar(temperature, T_POINTER)
        inv_t = 1.0 / t
        kl_scale = t * t
    return scalar(ce_weight, CE_POINTER), scalar(kl_weight, KL_POINTER), inv_t, kl_scale


@triton.jit
def averaged(ce_factor, kl_factor, counts, labels, label_stride, class_weight, sample_weight, N,
             ignore_index, MIMIC_IGNORED: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The factors of the gradients, divided by the numbers of rows that the means are over. These
    are counted here, from all N labels, unless an earlier launch has left them in `counts`."""
    if counts is None:
        ce_count, labelled_rows, all_rows = count_rows(
            labels, label_stride, class_weight, sample_weight, N, ignore_index, C
        )
    else:
        ce_count = tl.load(counts)
        labelled_rows = tl.load(counts + 1)
        if sample_weight is not None:
            all_rows = tl.load(counts + 2)
    ce_factor *= inverse(ce_count)
    if MIMIC_IGNORED and sample_weight is None:
        kl_factor *= 1.0 / tl.cast(N, tl.float32)
    elif MIMIC_IGNORED:
        kl_factor *= inverse(all_rows)
    else:
        kl_factor *= inverse(labelled_rows)
    return ce_factor, kl_factor


@triton.jit
def open_gates(RIGHT, NLL, labelled, GATE: tl.constexpr, K: tl.constexpr):
    """For each peer 1.0 on the rows that it teaches: those it classifies right ("correct"), or
    those on which it is the first to have the lowest cross-entropy ("best")."""
    GATES = ()
    best = NLL[0]
    for k in tl.static_range(1, K):
        best = tl.minimum(best, NLL[k])  # of a NaN and a number, the number
    free = labelled
    for k in tl.static_range(K):
        teaches = RIGHT[k]
        if GATE == "best":
            teaches = free & (NLL[k] == best)
            free = free & (NLL[k] != best)
        GATES = GATES + (tl.where(teaches, 1.0, 0.0),)
    return GATES


@triton.jit
def learned_from(k: tl.constexpr, l: tl.constexpr, peer_weights,  # noqa: E741
                 K: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """How much peer k learns from peer l where no gate is, a scalar."""
    if peer_weights is None:
        w = tl.cast(EDGE, tl.float32)
    else:
        w = tl.load(peer_weights + k * K + l).to(tl.float32)
    return w


@triton.jit
def soft_gates(LOG_G, peer_weights, K: tl.constexpr, EDGE: tl.constexpr):
    """What `soft_edge` takes, from the logarithm of how much each of K peers is to count as a
    teacher: that logarithm, -inf for a peer that is NaN; for each student the highest among its own
    teachers; and for each student the factor by which its teachers' weights, relative to that
    one's, sum up to what they do without a gate. It is 0 where nobody teaches."""
    KNOWN = ()
    for l in tl.static_range(K):  # noqa: E741
        KNOWN = KNOWN + (tl.where(LOG_G[l] == LOG_G[l], LOG_G[l], float("-inf")),)
    HIGHEST = ()
    FACTOR = ()
    for k in tl.static_range(K):
        highest = tl.minimum(KNOWN[k], float("-inf"))
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w = learned_from(k, l, peer_weights, K, EDGE)
                highest = tl.maximum(highest, tl.where(w != 0.0, KNOWN[l], float("-inf")))
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        ungated = 0.0
        gated = 0.0 * highest
        for l in tl.static_range(K):  # noqa: E741
            if l != k:
                w = learned_from(k, l, peer_weights, K, EDGE)
                ungated += w
                gated += times(w, tl.exp(KNOWN[l] - highest))
        HIGHEST = HIGHEST + (highest,)
        FACTOR = FACTOR + (
            tl.where(gated == 0.0, 0.0, ungated / tl.where(gated == 0.0, 1.0, gated)),
        )
    return KNOWN + HIGHEST + FACTOR


@triton.jit
def soft_edge(k: tl.constexpr, l: tl.constexpr, w, GATES, K: tl.constexpr):  # noqa: E741
    """How much peer k learns from peer l behind `soft_gates`, from the weight w without a gate."""
    return times(w, tl.exp(GATES[l] - GATES[K + k])) * GATES[2 * K + k]


@triton.jit
def reduce_programs(partials, losses, stats, ce_weight, kl_weight, kl_scale, N,
                    K: tl.constexpr, LAYOUT: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
                    REDUCTION: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
                    STATS: tl.constexpr, WEIGHED: tl.constexpr):  # fmt: skip
    """Adds the programs' sums in a fixed order and writes losses (K,) and packed statistics, whose
    layout the sums have. Without STATS there are no sums from the entropy on.

    WEIGHED: rows have weights. With MIMIC_IGNORED their sum then lies in the place of the first
    peer's divergence from itself, which is 0."""
    S: tl.constexpr = LAYOUT.size
    USED: tl.constexpr = LAYOUT.used if STATS else LAYOUT.entropy
    programs = tl.num_programs(0)
    s = tl.arange(0, S)
    total = tl.zeros((S,), tl.float32)
    for start in range(0, programs, PROGRAMS_BLOCK):
        b = start + tl.arange(0, PROGRAMS_BLOCK)
        used = s < USED
        if WEIGHED and MIMIC_IGNORED:
            used = used | (s == LAYOUT.pairwise_kl)
        part = tl.load(partials + b[:, None] * S + s[None, :],
                       mask=(b < programs)[:, None] & used[None, :], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        total += tl.sum(part, axis=0)
    ce_count = tl.sum(tl.where(s == LAYOUT.label_weight, total, 0.0), axis=0)
    labelled = tl.sum(tl.where(s == LAYOUT.labelled, total, 0.0), axis=0)
    kl_count = labelled
    if MIMIC_IGNORED:
        kl_count = tl.cast(N, tl.float32)
        if WEIGHED:
            kl_count = tl.sum(tl.where(s == LAYOUT.pairwise_kl, total, 0.0), axis=0)
            total = tl.where(s == LAYOUT.pairwise_kl, 0.0, total)
        # a batch without any label teaches by the KL term alone
        ce_count = tl.where(labelled == 0, 1.0, ce_count)
    # 0 / 0 as in torch, where label smoothing makes the sum another number too
    ce_count = tl.where(ce_count == 0, float("nan"), ce_count)
    is_ce = s < LAYOUT.kl
    is_kl = (s >= LAYOUT.kl) & (s < LAYOUT.label_weight)
    is_count = (s == LAYOUT.label_weight) | (s == LAYOUT.labelled)
    mean = total / tl.where(is_ce, ce_count, kl_count)
    mean = tl.where(is_kl, mean * kl_scale, mean)
    if STATS:
        is_pair = (s >= LAYOUT.pairwise_kl) & (s < LAYOUT.used)
        mean = tl.where(is_pair, mean * kl_scale, mean)
        is_count = is_count | ((s >= LAYOUT.correct) & (s < LAYOUT.pairwise_kl))
        tl.store(stats + s, tl.where(is_count, total, mean))
    if REDUCTION != "none":
        value = mean
        if REDUCTION == "sum":
            value = tl.where(is_kl, total * kl_scale, total)
        # a term of weight 0 is 0, even if its sum is infinite or NaN
        value = tl.where(ce_weight == 0.0, tl.where(is_ce, 0.0, value), value)
        value = tl.where(kl_weight == 0.0, tl.where(is_kl, 0.0, value), value)
        for k in tl.static_range(K):
            ce = tl.sum(tl.where(s == LAYOUT.ce + k, value, 0.0), axis=0)
            kl = tl.sum(tl.where(s == LAYOUT.kl + k, value, 0.0), axis=0)
            loss = ce_weight * ce
            if K > 1:
                loss += kl_weight * kl
            tl.store(losses + k, loss)


@triton.jit
def finish(partials, counter, losses, stats, ce_weight, kl_weight, kl_scale, N,
           K: tl.constexpr, LAYOUT: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
           REDUCTION: tl.constexpr, MIMIC_IGNORED: tl.constexpr, STATS: tl.constexpr,
           WEIGHED: tl.constexpr):  # fmt: skip
    """Each program calls this once its sums are stored. By an atomic counter the last one to finish
    knows that it is: it adds up the sums of all in a fixed order, and resets the counter to 0."""
    if REDUCTION != "none" or STATS:
        tl.debug_barrier()  # every thread's sums are written before this program counts as done
        done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == tl.num_programs(0) - 1:
            reduce_programs(partials, losses, stats, ce_weight, kl_weight, kl_scale, N, K,
                            LAYOUT, PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS,
                            WEIGHED)  # fmt: skip
            tl.store(counter, 0)
