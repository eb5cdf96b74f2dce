"""The first pass of `wide_rows` and `coupled_rows`: an online softmax over one sample's K rows.
Notation as in `wide_functions`."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import put, rounded_product, times
from .wide_functions import load_peers, peer_sums


@triton.jit
def joined_lanes(M, SUM, SUM_T, ENERGY, SPREAD, FIRST, GAP, energy, inv_t, peer,
                 K: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, PEERS: tl.constexpr,
                 TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, ENTROPY: tl.constexpr,
                 ARGMAX: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """A row's maxima and sums, as `online_sums` returns them, from those of its lanes; `energy` is
    ready where there is but one."""
    OF_M = ()
    OF_SUM = ()
    OF_SUM_T = ()
    OF_GAP = ()
    spread = tl.zeros((PEERS,), tl.float32)
    first = tl.zeros((PEERS,), tl.int32)
    for k in tl.static_range(K):
        m = tl.max(M[k], axis=0)
        shift = tl.where(m == float("-inf"), 0.0, m)
        shrink = tl.exp(M[k] - shift)
        OF_M = OF_M + (m,)
        OF_SUM = OF_SUM + (tl.sum(rounded_product(SUM[k], shrink), axis=0),)
        sum_t = tl.cast(0.0, tl.float32)
        if TEMPERED:
            shrink_t = tl.exp((M[k] - shift) * inv_t)
            sum_t = tl.sum(rounded_product(SUM_T[k], shrink_t), axis=0)
        OF_SUM_T = OF_SUM_T + (sum_t,)
        if REVERSE:
            gap = times(tl.exp((M[k] - shift) * inv_t), GAP[k])
            OF_GAP = OF_GAP + (tl.sum(gap, axis=0),)
        if ENTROPY and LANES > 1:
            energy = put(energy, k, tl.sum(ENERGY[k] * shrink, axis=0), PEERS)
        if SMOOTHED:
            spread = put(spread, k, tl.sum(SPREAD[k], axis=0), PEERS)
        if ARGMAX:
            at = tl.min(tl.where(M[k] == m, FIRST[k], C), axis=0)
            first = tl.where(peer == k, at, first)
    return OF_M, OF_SUM, OF_SUM_T, energy, spread, first, OF_GAP


@triton.jit
def online_sums(logits, class_weight, peer_weights, n64, inv_t, peer, teacher,
                K: tl.constexpr, C: tl.constexpr, STRIDES: tl.constexpr, READABLE: tl.constexpr,
                BLOCK_C: tl.constexpr, LANE: tl.constexpr, ADJACENT: tl.constexpr,
                PEERS: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
                ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, PAIRS: tl.constexpr,
                REVERSE: tl.constexpr, LAST: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Online softmax over one sample's K rows: the running maximum of each, and running sums that
    are rescaled whenever it grows. Sums are relative to the row's maximum m.

    A block is cut into lanes of LANE classes, and each lane has a maximum and sums of its own until
    the row ends. A thread holds whole lanes (ADJACENT: their classes lie side by side, as a vector
    load brings them; else LANES apart), so that no block makes the threads wait for each other.
    With PAIRS the block is one lane, since each pair's sum in each lane would take a register.

    M: m. SUM: sum exp(z - m). SUM_T: sum exp((z - m) / T), TEMPERED only.
    energy (PEERS,): sum exp(z - m) z, for the entropy (ENTROPY).
    spread (PEERS,): sum w_c z, for label smoothing (SMOOTHED).
    first (PEERS,): the first class that reaches the maximum (ARGMAX).
    GAP: sum exp((z_k - m_k) / T) sum_l w_kl (z_k - z_l) of each student k, for the divergences from
        all its teachers at once (REVERSE); w_kl is 1 without `peer_weights`.
    cross (PEERS, PEERS): sum exp((z_l - m_l) / T) (z_l - z_k) / T at [l, k] (PAIRS).
    """
    LANES: tl.constexpr = BLOCK_C // LANE
    tl.static_assert(LANES == 1 or not PAIRS)
    M = ()
    SUM = ()
    SUM_T = ()
    ENERGY = ()
    SPREAD = ()
    FIRST = ()
    GAP = ()
    for k in tl.static_range(K):
        M = M + (tl.full((LANES,), float("-inf"), tl.float32),)
        SUM = SUM + (tl.zeros((LANES,), tl.float32),)
        SUM_T = SUM_T + (tl.zeros((LANES,), tl.float32),)
        ENERGY = ENERGY + (tl.zeros((LANES,), tl.float32),)
        SPREAD = SPREAD + (tl.zeros((LANES,), tl.float32),)
        FIRST = FIRST + (tl.zeros((LANES,), tl.int32),)
        GAP = GAP + (tl.zeros((LANES,), tl.float32),)
    # Of one lane energy is kept in one tensor for all peers, which takes fewer registers.
    energy = tl.zeros((PEERS,), tl.float32)
    cross = tl.zeros((PEERS, PEERS), tl.float32)
    lane = tl.arange(0, LANES)[:, None]
    place = tl.arange(0, LANE)[None, :]
    if ADJACENT:
        inside = lane * LANE + place
    else:
        inside = place * LANES + lane
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = start + inside
        Z = load_peers(logits, n64, c, -BLOCK_C - start, K, C, STRIDES, READABLE, LAST)
        if SMOOTHED:
            w_c = tl.where(c < C, 1.0, 0.0)
            if class_weight is not None:
                w_c = tl.load(class_weight + c, mask=c < C, other=0.0).to(tl.float32)
        NEW_M = ()
        NEW_SUM = ()
        NEW_SUM_T = ()
        NEW_ENERGY = ()
        NEW_SPREAD = ()
        NEW_FIRST = ()
        NEW_GAP = ()
        for k in tl.static_range(K):
            z = Z[k]
            highest = tl.max(z, axis=1)
            m = tl.maximum(M[k], highest)
            shift = tl.where(m == float("-inf"), 0.0, m)
            e = tl.exp(z - shift[:, None])
            shrink = tl.exp(M[k] - shift)
            NEW_M = NEW_M + (m,)
            NEW_SUM = NEW_SUM + (tl.fma(SUM[k], shrink, tl.sum(e, axis=1)),)
            e_t = e
            shrink_t = shrink
            sum_t = SUM_T[k]
            if TEMPERED:
                e_t = tl.exp((z - shift[:, None]) * inv_t)
                shrink_t = tl.exp((M[k] - shift) * inv_t)
                sum_t = tl.fma(sum_t, shrink_t, tl.sum(e_t, axis=1))
            NEW_SUM_T = NEW_SUM_T + (sum_t,)
            grown = ENERGY[k]
            if ENTROPY and LANES == 1:
                more = energy * shrink + tl.sum(times(e, z), axis=1)
                energy = tl.where(peer == k, more, energy)
            elif ENTROPY:
                grown = grown * shrink + tl.sum(times(e, z), axis=1)
            NEW_ENERGY = NEW_ENERGY + (grown,)
            weighted = SPREAD[k]
            if SMOOTHED:
                weighted += tl.sum(tl.where(c < C, times(w_c, z), 0.0), axis=1)
            NEW_SPREAD = NEW_SPREAD + (weighted,)
            at = FIRST[k]
            if ARGMAX:
                here = tl.min(tl.where(z == highest[:, None], c, C), axis=1)
                at = tl.where(highest > M[k], here, at)
            NEW_FIRST = NEW_FIRST + (at,)
            behind = GAP[k]
            if REVERSE:
                gap = tl.zeros_like(z)
                for j in tl.static_range(K):
                    if j != k:
                        if peer_weights is None:
                            gap += z - Z[j]
                        else:
                            w = tl.load(peer_weights + k * K + j).to(tl.float32)
                            gap += times(w, z - Z[j])
                behind = times(shrink_t, behind) + tl.sum(times(e_t, gap), axis=1)
            NEW_GAP = NEW_GAP + (behind,)
            if PAIRS:
                GAPS = ()
                for j in tl.static_range(K):
                    if j != k:
                        gap = times(e_t, (z - Z[j]) * inv_t)
                        GAPS = GAPS + (tl.reshape(gap, (BLOCK_C,)),)
                    else:
                        GAPS = GAPS + (tl.zeros((BLOCK_C,), tl.float32),)
                pairs = peer_sums(GAPS, K, PEERS, BLOCK_C)[None, :]
                cross = tl.where(teacher == k, times(shrink_t[:, None], cross) + pairs, cross)
        M = NEW_M
        SUM = NEW_SUM
        SUM_T = NEW_SUM_T
        ENERGY = NEW_ENERGY
        SPREAD = NEW_SPREAD
        FIRST = NEW_FIRST
        GAP = NEW_GAP
    return joined_lanes(M, SUM, SUM_T, ENERGY, SPREAD, FIRST, GAP, energy, inv_t, peer, K, C,
                        LANES, PEERS, TEMPERED, SMOOTHED, ENTROPY, ARGMAX,
                        REVERSE) + (cross,)  # fmt: skip
