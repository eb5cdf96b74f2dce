"""The augmentation kernel, whole-batch torch and one image at a time must make the same bits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastdml_kernels.augment import augment
from fastdml_kernels.augment_options import Augment, bytes_moved, erasing_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml.data import ImageSet, RandomSampler
from fastdml.data import augment as plain
from fastdml.data.loaders.torch_workers import resize, transform
from fastdml.data.philox import EPOCH, draw, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]
CIFAR = Augment(32, 32, 4, True, True)
MARKET = Augment(256, 128, 10, False, True, 0.5)


def random_set(n=9, height=8, width=9, ch=3, seed=0) -> ImageSet:
    random = torch.Generator().manual_seed(seed)
    return ImageSet(
        torch.randint(0, 256, (n, ch, height, width), dtype=torch.uint8, generator=random),
        torch.randint(0, 5, (n,), generator=random),
        5,
        tuple("abcde"),
        tuple(100.3 + 10 * c for c in range(ch)),
        tuple(50.7 + 5 * c for c in range(ch)),
    )


def one_by_one(images, samples, what, seed, epoch, repetitions=None) -> torch.Tensor:
    choices = plain.choose(what, seed, epoch, samples, repetitions)
    mean = np.array(images.mean, np.float32)
    scale = 1 / np.array(images.std, np.float32)
    rows = zip(samples.tolist(), torch.stack(choices, 1).tolist(), strict=True)
    pixels = images.pixels.numpy()
    return torch.from_numpy(
        np.stack([transform(pixels[sample], what, row, mean, scale) for sample, row in rows])
    ).permute(0, 3, 1, 2)


def whole_batch(images, samples, what, seed, epoch, repetitions=None) -> torch.Tensor:
    mean, scale = torch.tensor(images.mean), 1 / torch.tensor(images.std)
    choices = plain.choose(what, seed, epoch, samples, repetitions)
    pixels = images.pixels.contiguous()
    return plain.batch(pixels, samples, mean, scale, what, choices).permute(0, 3, 1, 2)


def by_kernel(images, samples, what, seed, epoch, repetitions=None, dtype=torch.float32):
    mean, scale = torch.tensor(images.mean), 1 / torch.tensor(images.std)
    return augment(
        images.pixels.contiguous().to(DEVICE),
        images.labels.to(DEVICE),
        samples.to(DEVICE),
        mean.to(DEVICE),
        scale.to(DEVICE),
        what,
        seed=seed,
        epoch=epoch,
        repetitions=None if repetitions is None else repetitions.to(DEVICE),
        dtype=dtype,
    )


@triton.jit
def draw_words(out, seed, epoch, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    words = tl.philox(seed, tl.full((SIZE,), epoch, tl.int32), i, i * 0, i * 0)
    tl.store(out + i, words[0].to(tl.int64))
    tl.store(out + SIZE + i, tl.umulhi(words[1], tl.full((SIZE,), n, tl.uint32)).to(tl.int64))
    tl.store(out + 2 * SIZE + i, words[2].to(tl.int64))
    tl.store(out + 3 * SIZE + i, tl.umulhi(words[3], tl.full((SIZE,), 2, tl.uint32)).to(tl.int64))


def test_triton_draws_the_numbers_of_the_counter():
    out = torch.empty(4, 64, dtype=torch.int64, device=DEVICE)
    seed, epoch = 2**62 + 12345, 199
    draw_words[(1,)](out, seed, epoch, 9, 64)
    order, top, left, flip = draw(seed, epoch, torch.arange(64), EPOCH)
    assert torch.equal(out.cpu(), torch.stack([order, uniform(top, 9), left, uniform(flip, 2)]))


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    st.tuples(st.integers(1, 14), st.integers(1, 14)) | st.none(),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0, 3]),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
)
def test_kernel_batch_and_single_images_agree(
    stored, size, pad, reflect, flip, erase, cutout, seed, epoch
):
    height, width = size or stored[:2]
    if reflect:
        pad = min(pad, height - 1, width - 1)
    what = Augment(height, width, pad, reflect, flip, erase, cutout)
    images = random_set(7, *stored)
    samples = torch.tensor([6, 0, 3])
    repetitions = torch.tensor([0, 5, 2**31]) if pad % 2 else None
    expected = one_by_one(images, samples, what, seed, epoch, repetitions)
    assert torch.equal(whole_batch(images, samples, what, seed, epoch, repetitions), expected)
    found, labels = by_kernel(images, samples, what, seed, epoch, repetitions)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(labels.cpu(), images.labels[samples])
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_one_rounding(dtype):
    images, samples = random_set(), torch.arange(9)
    what = Augment(8, 9, 2, True, True, 0.5)
    exact = whole_batch(images, samples, what, 3, 4)
    found = by_kernel(images, samples, what, 3, 4, dtype=dtype)[0].cpu()
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        # the interpreter cuts float32 off where the hardware rounds: a unit in the last place
        assert ((found.float() - exact).abs() <= exact.abs() * 2**-7).all()
    else:
        assert torch.equal(found, exact.to(dtype))


def test_epoch_may_be_a_tensor():
    images, samples = random_set(), torch.arange(9)
    what = Augment(8, 9, 2, True, True, 0.5)
    at = torch.full((1,), 2**31 + 5, dtype=torch.int64, device=DEVICE)
    a, b = (by_kernel(images, samples, what, 3, epoch)[0] for epoch in (at, 2**31 + 5))
    assert torch.equal(a, b)


def test_no_samples():
    images, labels = by_kernel(random_set(), torch.arange(0), CIFAR, 0, 0)
    assert images.shape == (0, 3, 32, 32)
    assert len(labels) == 0


@pytest.mark.parametrize(("size", "grey_levels"), [((16, 18), 0), ((21, 13), 1), ((5, 4), 1)])
def test_resize_is_that_of_interpolate(size, grey_levels):
    """Half-pixel centres without antialiasing; exact where sizes double, else one grey level."""
    images = replace(random_set(), mean=(0.0,) * 3, std=(1.0,) * 3)
    found = by_kernel(images, torch.arange(9), Augment(*size), 0, 0)[0].cpu()
    expected = torch.nn.functional.interpolate(
        images.images.float(), size=size, mode="bilinear", align_corners=False
    )
    assert (found - expected).abs().max() <= max(grey_levels, 1e-4)


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 40)] * 4)
def test_resize_of_one_image_is_two_matrix_products(height, width, to_height, to_width):
    """By the definition, in float64: rows and columns weighted in 256ths."""

    def weights(size: int, out: int) -> np.ndarray:  # (out, size)
        table = np.zeros((out, size))
        for position in range(out):
            at = max((position + Fraction(1, 2)) * size / out - Fraction(1, 2), 0)
            first, second = divmod(math.floor(at * 256 + Fraction(1, 2)), 256)
            table[position, min(first, size - 1)] += (256 - second) / 256
            table[position, min(first + 1, size - 1)] += second / 256
        return table

    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.einsum(
        "ih,hwc,jw->ijc", weights(height, to_height), image, weights(width, to_width)
    )
    assert np.array_equal(resize(image, to_height, to_width), expected)


N = 20_000


def likely(counts: torch.Tensor, shares: torch.Tensor | None = None) -> bool:
    """Whether Pearson's statistic lies within five standard deviations of its mean."""
    share = torch.full((len(counts),), 1 / len(counts)) if shares is None else shares
    expected = counts.sum() * share.double()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("repetition", [None, torch.arange(N) % 3 + 1])
def test_crops_flips_and_erasings_are_uniform(repetition):
    what = replace(CIFAR, erase=0.3)
    top, left, flip, above, _, rows, columns = plain.choose(
        what, 11, 2, torch.arange(N), repetition
    )
    assert likely(torch.bincount((top * 9 + left) * 2 + flip, minlength=162))
    erased = rows > 0
    assert likely(torch.bincount(erased.long()), torch.tensor([0.7, 0.3]))
    assert likely(torch.bincount(flip * 2 + erased, minlength=4), torch.tensor([7, 3, 7, 3]) / 20)
    # of one shape, the place is uniform; over all shapes, so is the shape
    shapes = erasing_shapes(32, 32)
    index = torch.tensor([r * 32 + c for r, c in shapes])
    share = torch.bincount(index, minlength=1024) / len(shapes)
    kept = share > 0
    found = torch.bincount(rows[erased] * 32 + columns[erased], minlength=1024)
    assert found[~kept].sum() == 0
    assert likely(found[kept], share[kept])
    assert ((above >= 0) & (above + rows <= 32))[erased].all()
    thin = erased & (rows <= 16)
    half = (above[thin] * 2 >= 32 - rows[thin] + 1).long()
    even = (32 - rows[thin] + 1) % 2 == 0
    assert likely(torch.bincount(half[even], minlength=2))


def test_cutout_centres_are_uniform():
    what = Augment(8, 8, 0, True, False, 1.0, 3)
    *_, above, before, rows, columns = plain.choose(what, 5, 0, torch.arange(N))
    assert set(rows.tolist()) == set(columns.tolist()) == {3}
    assert likely(torch.bincount((above + 1) * 8 + before + 1, minlength=64))


def test_erased_share_is_that_of_the_paper():
    """Area uniform in 2 to 40 %, less what does not fit."""
    shares = torch.tensor([r * c / (256 * 128) for r, c in erasing_shapes(256, 128)])
    assert 0.01 < shares.min() < 0.03
    assert 0.35 < shares.max() < 0.42
    assert 0.1 < shares.mean() < 0.21


def test_a_repeated_sample_is_augmented_otherwise():
    what = replace(CIFAR, erase=0.5)
    samples = torch.zeros(200, dtype=torch.int64)
    shown = torch.stack(plain.choose(what, 1, 1, samples, torch.arange(200)), 1)
    assert len(shown.unique(dim=0)) > 140


REPORT = """
import json
from fastdml_kernels import static_report
try:
    found = static_report.reports(["cifar", "market"], archs=["sm_80", "sm_90", "sm_100"])
except RuntimeError as error:
    found = str(error)
print(json.dumps(found if isinstance(found, str) else [report.as_dict() for report in found]))
"""


def test_machine_code_moves_the_budget():
    """Each byte of a batch is written once, 16 at a time. Each stored byte of CIFAR is loaded once;
    a resize to twice the size asks for four pixels a pixel, 16 times for each. Nothing spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    run = subprocess.run(
        [sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    if "no cuobjdump" in found:
        pytest.skip(found)
    assert len(found) == 6
    for report in found:
        assert report["stack_bytes"] == report["spills"] == 0, report
        assert report["registers"] <= 128, report
        assert report["launches"] == report["writes"] == 1, report
        assert set(report["store_widths"]) == {"16"}, report
        assert report["reads"] == (1 if report["kernel"] == "augment cifar" else 16), report
        budget = 3_072 + 6_144 if report["kernel"] == "augment cifar" else 24_576 + 196_608
        assert report["least_bytes"] == budget, report
        assert report["bytes_per_row"] == budget + (report["reads"] - 1) * 24_576, report


def test_byte_budget():
    assert bytes_moved((32, 32, 3), CIFAR, 2) == 3072 + 6144
    assert bytes_moved((128, 64, 3), MARKET, 2) == 24_576 + 196_608


def test_order_words_are_not_those_of_the_choices():
    """Where a sample stands in the epoch says nothing of its crop."""
    order = RandomSampler(N).order(0, 0).sample
    late = torch.empty(N, dtype=torch.int64)
    late[order] = (torch.arange(N) >= N // 2).long()
    top, _, flip, *_ = plain.choose(CIFAR, 0, 0, torch.arange(N))
    assert likely(torch.bincount(late * 18 + top * 2 + flip, minlength=36))


def test_what_augmentation_does_is_known_without_torch_and_triton():
    code = """
import sys
import fastdml_kernels.augment_options
print(*sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert done.returncode == 0
