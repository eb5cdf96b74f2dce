"""Random numbers as a pure function of (seed, epoch, sample, purpose): Philox-4x32-10.

A counter-based generator has no state to save: the choices for any sample of any epoch are computed
directly, the same on every device. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011. About 120 elementwise int64 operations a call, done once an epoch for all samples.

Layout, as in `fastdml_kernels.augment`, `tl.philox(seed, epoch, sample, purpose, repetition)`:

    key      k0 = seed mod 2**32   k1 = seed div 2**32
    counter  c0 = epoch   c1 = sample (index in the set)   c2 = purpose
             c3 = repetition: 0, unless an epoch may show a sample more than once

    purpose  EPOCH   word 0: place in the epoch (samples are sorted by it, stably)
                     word 1: crop's top row    word 2: crop's left column    word 3: flip
             SUBSET  word 0: place within its class (epoch is 0)
             ERASE   word 0: whether   word 1: which shape   word 2: top row   word 3: left column
             GROUP   word 0: place within its identity   word 1: when the identity's groups come
             POLICY  word 0: seed of torchvision's policy
             VALIDATION   word 0: place within its class (epoch is 0)

A 32-bit word w becomes an integer in [0, n) as (w * n) >> 32, that is `tl.umulhi(w, n)`; no
value's probability is off by more than 2**-32. The words live in int64 tensors, since torch does
little arithmetic in uint32.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastdml.errors import InputError

# Purposes; each opens an independent stream.
EPOCH, SUBSET, ERASE, GROUP, POLICY, VALIDATION = 0, 1, 2, 3, 4, 5

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Word = Tensor | int


def philox_4x32(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, ...]:
    """Ten Philox rounds. Words are in [0, 2**32): int64 tensors, or ints that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap; an arithmetic shift and a mask still give the unsigned high word
        product_0, product_2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((product_2 >> 32) & MASK) ^ c1 ^ k0, product_2 & MASK
        c2, c3 = ((product_0 >> 32) & MASK) ^ c3 ^ k1, product_0 & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def draw(
    seed: int, epoch: Word, samples: Tensor, purpose: int, repetition: Word = 0
) -> tuple[Tensor, ...]:
    """Four words for each of `samples` (N,) int64: 4 tensors (N,), or of the shape that epoch,
    samples and repetition broadcast to."""
    words = philox_4x32((epoch, samples, purpose, repetition), (seed & MASK, seed >> 32))
    return cast("tuple[Tensor, ...]", words)  # since one word of the counter is a tensor


def uniform(words: Tensor, n: Word) -> Tensor:
    """Integers in [0, n) from 32-bit words, n < 2**31."""
    return (words * n) >> 32


def check_seed(seed: int) -> int:
    """`seed`. Raises InputError for one that is not from 0 to 2**63 - 1."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed} is out of range: give an integer from 0 to 2**63 - 1")
    return seed


def permutation(words: Tensor) -> Tensor:
    """The order that sorts `words` (N,), equal words keeping theirs: the same on every device."""
    return torch.argsort(words, stable=True)


def rank_in_class(labels: Tensor, words: Tensor) -> Tensor:
    """The place (N,) int64 of each sample among those of its label, in the order of `words`. labels
    and words: (N,) int64 on the CPU, words below 2**32."""
    by_class = permutation((labels << 32) + words)
    sizes = torch.bincount(labels)
    first = sizes.cumsum(0) - sizes  # (C,) where each class starts in by_class
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels), device="cpu") - first[labels[by_class]]
    return rank
