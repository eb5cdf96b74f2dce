from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml.data.counter import EPOCH, SUBSET, check_seed, draw, philox_4x32, uniform
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


TRITON = """
import torch, triton, triton.language as tl
from fastdml.data.counter import EPOCH, draw, uniform

@triton.jit
def kernel(out, seed, epoch, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    words = tl.philox(seed, tl.full((SIZE,), epoch, tl.int32), i, i * 0, i * 0)
    tl.store(out + i, words[0].to(tl.int64))
    tl.store(out + SIZE + i, tl.umulhi(words[1], tl.full((SIZE,), n, tl.uint32)).to(tl.int64))
    tl.store(out + 2 * SIZE + i, words[2].to(tl.int64))
    tl.store(out + 3 * SIZE + i, tl.umulhi(words[3], tl.full((SIZE,), 2, tl.uint32)).to(tl.int64))

device = "DEVICE"
out = torch.empty(4, 64, dtype=torch.int64, device=device)
seed, epoch = 2**62 + 12345, 199
kernel[(1,)](out, seed, epoch, 9, 64)
order, top, left, flip = draw(seed, epoch, torch.arange(64), EPOCH)
expected = torch.stack([order, uniform(top, 9), left, uniform(flip, 2)])
assert torch.equal(out.cpu(), expected), (out, expected)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_draws_the_same_numbers(device, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    script = tmp_path / "philox.py"  # triton reads its kernels' source, so they need a file
    script.write_text(TRITON.replace("DEVICE", device))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"  # must be set before triton is imported
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
