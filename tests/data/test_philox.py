from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml.data.philox import EPOCH, SUBSET, check_seed, draw, philox_4x32, uniform
from fastdml.errors import InputError

word = st.integers(0, 2**32 - 1)

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert philox_4x32(counter, key) == expected
    # many lanes, so that vectorised multiplications are tested too
    lanes = philox_4x32(tuple(torch.full((37,), c) for c in counter), key)
    for got, want in zip(lanes, expected, strict=True):
        assert got.dtype == torch.int64
        assert (got == want).all()


def philox_by_definition(counter, key):
    """The rounds as the paper writes them, in Python's unbounded integers."""
    (r0, l0, r1, l1), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = r0 * 0xD2511F53, r1 * 0xCD9E8D57
        r0, l0, r1, l1 = (
            (p1 // 2**32) ^ l0 ^ k0,
            p1 % 2**32,
            (p0 // 2**32) ^ l1 ^ k1,
            p0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return r0, l0, r1, l1


@settings(deadline=None)
@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_tensors_agree_with_unbounded_integers(counter, key):
    got = philox_4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(g) for g in got) == philox_by_definition(counter, key)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), word, word, st.sampled_from([EPOCH, SUBSET]))
def test_layout_of_a_draw(seed, epoch, sample, purpose):
    got = draw(seed, epoch, torch.tensor([sample]), purpose)
    expected = philox_by_definition((epoch, sample, purpose, 0), (seed % 2**32, seed // 2**32))
    assert tuple(int(g) for g in got) == expected


@settings(deadline=None)
@given(word, st.integers(1, 2**31 - 1))
def test_uniform_is_the_high_word_of_the_product(w, n):
    value = int(uniform(torch.tensor([w]), n))
    assert value == (w * n) // 2**32
    assert 0 <= value < n


@pytest.mark.parametrize("n", [2, 9, 100])
def test_uniform_favours_no_value(n):
    # each value owns the words from ceil(k 2**32 / n) on: counts differ by one word at most
    edges = [-(-k * 2**32 // n) for k in range(n + 1)]
    sizes = {b - a for a, b in itertools.pairwise(edges)}
    assert max(sizes) - min(sizes) <= 1
    words = torch.tensor([e for edge in edges[1:-1] for e in (edge - 1, edge)])
    expected = torch.tensor([k for edge in range(1, n) for k in (edge - 1, edge)])
    assert torch.equal(uniform(words, n), expected)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(InputError, match=rf"seed {seed} .* from 0 to"):
        check_seed(seed)
