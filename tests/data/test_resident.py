from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import random_set

from fastdml.data import ImageSet, ResidentLoader, load_cifar100
from fastdml.data.augment import Augment, choose
from fastdml.data.loaders import resident
from fastdml.data.samplers import RandomSampler, RepeatedSampler
from fastdml.errors import InputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def epoch_choices(seed: int, epoch: int, n: int, *, pad: int, flip: bool):
    """(sample, top, left, flip) of an epoch, (n,) each."""
    sample = RandomSampler(n).order(seed, epoch).sample
    height = max(2 * pad, 1)
    top, left, mirror, *_ = choose(Augment(height, height, pad, True, flip), seed, epoch, sample)
    return sample, top, left, mirror


def pixels(loader: ResidentLoader, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of a set whose `raw` form the loader was given: (B, ch, H, W) uint8, and labels."""
    images, labels = loader.batch(epoch, step)
    assert torch.equal(images, images.byte().to(images.dtype))
    return images.byte(), labels


def raw(images: ImageSet) -> ImageSet:
    """Normalised by nothing: batches hold the bytes themselves."""
    ch = images.images.shape[1]
    return replace(images, mean=(0.0,) * ch, std=(1.0,) * ch)


def reference_pixels(images: ImageSet, loader: ResidentLoader, epoch: int, step: int) -> np.ndarray:
    """One image at a time, as numpy writes it: (B, ch, H, W) uint8."""
    height, width = images.images.shape[2:]
    pad, flip = loader.augment.pad, loader.augment.flip
    choices = epoch_choices(loader.seed, epoch, len(images), pad=pad, flip=flip)
    out = []
    for i in range(step * loader.batch_size, (step + 1) * loader.batch_size):
        sample, top, left, flip = (int(choice[i]) for choice in choices)
        image = images.images[sample].numpy()
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        image = image[:, top : top + height, left : left + width]
        out.append(image[:, :, ::-1] if flip else image)
    return np.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 8),
    st.booleans(),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
)
def test_pixels_are_those_of_a_loop_over_images(ch, height, width, pad, flip, seed, epoch):
    images = raw(random_set(11, ch, height, width))
    pad = min(pad, height - 1, width - 1)
    loader = ResidentLoader(images, 5, seed=seed, train=True, pad=pad, flip=flip)
    for step in range(2):
        found, labels = pixels(loader, epoch, step)
        expected = reference_pixels(images, loader, epoch, step)
        assert np.array_equal(found.numpy(), expected)
        sample = epoch_choices(seed, epoch, 11, pad=pad, flip=flip)[0]
        assert torch.equal(labels, images.labels[sample[step * 5 : step * 5 + 5]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("ch", [1, 3])
def test_normalisation(dtype, channels_last, ch):
    images = random_set(ch=ch)
    options = {"train": True, "pad": 3, "dtype": dtype, "channels_last": channels_last}
    loader = ResidentLoader(images, 16, **options)
    batch, labels = loader.batch(2, 1)
    pixels = reference_pixels(images, loader, 2, 1).astype(np.float64)
    mean, std = (np.array(v)[:, None, None] for v in (images.mean, images.std))
    exact = torch.from_numpy((pixels - mean) / std)
    assert batch.dtype == dtype
    assert labels.dtype == torch.int64
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=layout)
    # one rounding to dtype, after fp32 arithmetic of three roundings
    tolerance = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    assert ((batch.double() - exact).abs() <= exact.abs() * tolerance).all()


def test_real_images(cifar100_root):
    """Reflection, crop and flip of CIFAR-100 against the loop over images, and against chance."""
    train, test = load_cifar100(cifar100_root)
    train = raw(train.subset(5_000))
    loader = ResidentLoader(train, 128, seed=5, train=True)
    for epoch, step in ((0, 0), (7, len(loader) - 1)):
        found, _ = pixels(loader, epoch, step)
        expected = reference_pixels(train, loader, epoch, step)
        assert np.array_equal(found.numpy(), expected)
    assert len(loader) == 39
    evaluation = ResidentLoader(test, 128, train=False)
    images, labels = evaluation.batch(0, 78)
    assert (len(evaluation), len(labels)) == (79, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (test.mean, test.std))
    torch.testing.assert_close(images, (test.images[-16:] - mean) / std)
    assert torch.equal(labels, test.labels[-16:])


def test_real_digits(digits):
    train, _ = digits
    loader = ResidentLoader(train, 64, train=True, pad=1, flip=False)
    whole = torch.cat([images for images, _ in loader.epoch(0)])
    assert abs(float(whole.mean())) < 0.15  # cropping moves the statistics a little
    assert abs(float(whole.std()) - 1) < 0.15


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=8),
)
def test_a_batch_depends_on_seed_epoch_and_step_alone(seed, asked):
    images = random_set()
    used = ResidentLoader(images, 7, seed=seed, train=True, pad=2)
    for epoch, step in asked:  # in any order, against a loader that has made no batch yet
        fresh = ResidentLoader(images, 7, seed=seed, train=True, pad=2)
        for a, b in zip(used.batch(epoch, step), fresh.batch(epoch, step), strict=True):
            assert torch.equal(a, b)


@given(st.integers(0, 7), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_resuming_gives_the_rest_of_the_epoch(start, epoch):
    whole = list(ResidentLoader(random_set(), 7, seed=1, train=True, pad=2).epoch(epoch))
    rest = list(ResidentLoader(random_set(), 7, seed=1, train=True, pad=2).epoch(epoch, start))
    assert len(rest) == 7 - start
    for (a, x), (b, y) in zip(whole[start:], rest, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


def test_the_global_generator_is_not_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = ResidentLoader(random_set(), 7, train=True).batch(0, 0)[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(first, ResidentLoader(random_set(), 7, train=True).batch(0, 0)[0])


def test_batches_made_before_are_not_changed():
    loader = ResidentLoader(random_set(), 7, train=True)
    images, labels = loader.batch(0, 0)
    kept = images.clone(), labels.clone()
    images.zero_()
    for epoch in range(2):
        list(loader.epoch(epoch))
    assert torch.equal(labels, kept[1])
    assert torch.equal(loader.batch(0, 0)[0], kept[0])


N = 20_000


def chi_square_is_likely(counts: torch.Tensor) -> bool:
    """Whether Pearson's statistic lies within five standard deviations of its mean."""
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**62 + 1, 199)])
def test_choices_are_uniform_and_independent(seed, epoch):
    sample, top, left, flip = epoch_choices(seed, epoch, N, pad=4, flip=True)
    assert (int(top.min()), int(top.max())) == (int(left.min()), int(left.max())) == (0, 8)
    assert chi_square_is_likely(torch.bincount((top * 9 + left) * 2 + flip, minlength=162))
    half = (sample >= N // 2).long()  # where a sample stood says nothing of its place or crop
    late = (torch.arange(N) >= N // 2).long()
    assert chi_square_is_likely(torch.bincount(half * 2 + late, minlength=4))
    assert chi_square_is_likely(torch.bincount(late * 9 + top, minlength=18))
    assert chi_square_is_likely(torch.bincount(half * 2 + flip, minlength=4))


def test_first_sample_is_uniform_over_epochs():
    firsts = torch.stack(
        [epoch_choices(9, epoch, 10, pad=0, flip=False)[0][0] for epoch in range(1000)]
    )
    assert chi_square_is_likely(torch.bincount(firsts, minlength=10))


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (2**32, 0)])
def test_other_epochs_and_seeds_choose_otherwise(other):
    a = epoch_choices(0, 0, N, pad=4, flip=True)
    b = epoch_choices(*other, N, pad=4, flip=True)
    assert int((a[0] == b[0]).sum()) < 12  # about one expected
    order = torch.argsort(a[0]), torch.argsort(b[0])
    for x, y, values in ((a[1], b[1], 9), (a[2], b[2], 9), (a[3], b[3], 2)):
        joint = x[order[0]] * values + y[order[1]]  # the same sample in both
        assert chi_square_is_likely(torch.bincount(joint, minlength=values**2))


def test_options_off_leave_the_pixels_alone():
    images = raw(random_set())
    loader = ResidentLoader(images, 50, train=True, pad=0, flip=False)
    found, _ = pixels(loader, 0, 0)
    sample = epoch_choices(0, 0, 50, pad=0, flip=False)[0]
    assert torch.equal(found, images.images[sample])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70))
def test_evaluation_keeps_order_and_all_samples(n, batch_size):
    images = raw(random_set(n))
    loader = ResidentLoader(images, batch_size, train=False, seed=3)
    batches = [pixels(loader, 0, step) for step in range(len(loader))]
    assert len(batches) == math.ceil(n / batch_size)
    assert torch.equal(torch.cat([p for p, _ in batches]), images.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert torch.equal(loader.batch(5, 0)[0], loader.batch(0, 0)[0])


@pytest.mark.parametrize(
    ("batch_size", "options", "message"),
    [
        (51, {}, "batch size 51 is larger than the 50 training images"),
        (0, {}, "batch size 0"),
        (5, {"pad": 8}, "pad 8: reflection needs 0 to 7 for 8x8 images"),
        (5, {"pad": -1}, "pad -1"),
        (5, {"seed": -1}, "seed -1"),
    ],
)
def test_what_is_wrong_is_named(batch_size, options, message):
    with pytest.raises(InputError, match=message) as error:
        ResidentLoader(random_set(), batch_size, **{"train": True, **options})
    assert "\n" not in str(error.value)


def test_steps_beyond_the_epoch():
    loader = ResidentLoader(random_set(), 7, train=True)
    for epoch, step in ((0, 7), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match=f"epoch {epoch}, step {step}: .* steps 0 to 6"):
            loader.batch(epoch, step)


def test_strided_images_are_accepted():
    images = random_set()
    strided = replace(images, images=images.images.flip(3).transpose(2, 3).transpose(2, 3).flip(3))
    view = replace(
        images, images=images.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    )
    expected = ResidentLoader(images, 7, train=True).batch(0, 0)[0]
    for other in (strided, view):
        assert torch.equal(ResidentLoader(other, 7, train=True).batch(0, 0)[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False])
def test_cuda_makes_the_same_batches_and_never_waits(train):
    images = random_set(500, 3, 32, 32)
    options = {"seed": 2, "train": train, "erase": 0.5, "padding": "black"}
    cpu = ResidentLoader(images, 64, **options)
    gpu = ResidentLoader(images, 64, **options, device="cuda")
    for epoch, step in ((0, 0), (3, 6)):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, labels = gpu.batch(epoch, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = cpu.batch(epoch, step)
        assert torch.equal(found.cpu(), expected[0])
        assert torch.equal(labels.cpu(), expected[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs under the interpreter")
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_kernel_makes_each_ranks_share_of_a_batch(monkeypatch, repeats):
    monkeypatch.setattr(resident, "has_kernel", lambda device: True)
    images = random_set(20, 3, 6, 5)
    options = {"train": True, "pad": 1, "erase": 0.5, "sampler": RepeatedSampler(20, repeats)}
    whole = ResidentLoader(images, 7, **options)
    ranks = [ResidentLoader(images, 7, **options, rank=r, world=3) for r in range(3)]
    expected = whole.batch(1, 1)
    shares = [loader.assemble(*loader.index(1, 1)) for loader in ranks]
    assert [len(labels) for _, labels in shares] == [2, 2, 3]
    for values, found in zip(expected, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat(found), values)
