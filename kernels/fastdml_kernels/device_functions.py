"""Device functions that several loss kernels call: the terms' weights, products in which 0 wins,
counts of labels, gates, and the sum over all programs that the last one to finish takes."""

from __future__ import annotations

import triton
import triton.language as tl

# Pointers to numbers that are read one at a time. Whether they are aligned to 16 bytes changes
# nothing in the code, but Triton would compile another kernel for it unless told not to.
SINGLE_READS = [
    "labels", "peer_weights", "upstream", "counts", "ce_weight", "kl_weight", "temperature",
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
def log_probability(z, inv_t, lse, TEMPERED: tl.constexpr):
    """log softmax(z / T) from its normaliser. Product and sum are fused by name: a compiler left
    to choose may fuse them for one peer and not for another, and identical peers then differ."""
    if TEMPERED:
        return tl.fma(z, inv_t, -lse)
    return z - lse


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
def averaged(ce_factor, kl_factor, counts, labels, label_stride, class_weight, N, ignore_index,
             HAS_CLASS_WEIGHT: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
             C: tl.constexpr):  # fmt: skip
    """The factors of the gradients, divided by the numbers of rows that the means are over. These
    are counted here, from all N labels, unless an earlier launch has left them in `counts`."""
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
def reduce_programs(partials, losses, stats, ce_weight, kl_weight, kl_scale, N,
                    K: tl.constexpr, LAYOUT: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
                    REDUCTION: tl.constexpr, MIMIC_IGNORED: tl.constexpr,
                    STATS: tl.constexpr):  # fmt: skip
    """Adds the programs' sums in a fixed order and writes losses (K,) and packed statistics, whose
    layout the sums have. Without STATS there are no sums from the entropy on."""
    S: tl.constexpr = LAYOUT.size
    USED: tl.constexpr = LAYOUT.used if STATS else LAYOUT.entropy
    programs = tl.num_programs(0)
    s = tl.arange(0, S)
    total = tl.zeros((S,), tl.float32)
    for start in range(0, programs, PROGRAMS_BLOCK):
        b = start + tl.arange(0, PROGRAMS_BLOCK)
        part = tl.load(partials + b[:, None] * S + s[None, :],
                       mask=(b < programs)[:, None] & (s < USED)[None, :], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        total += tl.sum(part, axis=0)
    ce_count = tl.sum(tl.where(s == LAYOUT.label_weight, total, 0.0), axis=0)
    labelled = tl.sum(tl.where(s == LAYOUT.labelled, total, 0.0), axis=0)
    kl_count = labelled
    if MIMIC_IGNORED:
        kl_count = tl.cast(N, tl.float32)
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
           REDUCTION: tl.constexpr, MIMIC_IGNORED: tl.constexpr, STATS: tl.constexpr):  # fmt: skip
    """Each program calls this once its sums are stored. By an atomic counter the last one to finish
    knows that it is: it adds up the sums of all in a fixed order, and resets the counter to 0."""
    if REDUCTION != "none" or STATS:
        tl.debug_barrier()  # every thread's sums are written before this program counts as done
        done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == tl.num_programs(0) - 1:
            reduce_programs(partials, losses, stats, ce_weight, kl_weight, kl_scale, N, K,
                            LAYOUT, PROGRAMS_BLOCK, REDUCTION, MIMIC_IGNORED, STATS)  # fmt: skip
            tl.store(counter, 0)
