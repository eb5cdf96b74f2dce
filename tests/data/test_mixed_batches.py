"""Batches of images with and without labels: their shares, order and bits, in every loader."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import random_set

from fastdml.data import DALILoader, ImageSet, MixedSampler, ResidentLoader, TorchLoader
from fastdml.data.image_set import IGNORED
from fastdml.data.loaders import make
from fastdml.errors import InputError

needs_dali = pytest.mark.skipif(not make.has_dali(), reason="DALI is not installed")


def partly_labelled(n: int, every: int) -> ImageSet:
    """One image in `every` keeps its label."""
    images = random_set(n, 3, 8, 8)
    kept = torch.arange(n) % every == 0
    return replace(images, labels=images.labels.where(kept, IGNORED))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60), st.integers(2, 12), st.integers(0, 2**63 - 1), st.integers(0, 9), st.data()
)  # fmt: skip
def test_each_batch_has_the_share_and_each_kind_goes_round(n, batch_size, seed, epoch, data):
    batch_size = min(batch_size, n)
    unlabelled = data.draw(st.integers(1, batch_size - 1))
    kept = data.draw(st.integers(1, n - 1))
    labels = torch.where(torch.arange(n) < kept, 0, IGNORED)
    sampler = MixedSampler(labels, batch_size, unlabelled)
    shown = []
    for e in range(epoch + 1):
        order = sampler.order(seed, e)
        batches = labels[order.sample].view(-1, batch_size)
        assert len(batches) == n // batch_size
        assert ((batches == IGNORED).sum(1) == unlabelled).all()
        # the same places in every batch, so that parts of a batch are alike too
        assert (batches == batches[0]).all()
        again = Counter(zip(order.sample.tolist(), order.repetition.tolist(), strict=True))
        assert max(again.values()) == 1  # else an image would be augmented alike twice
        shown += order.sample.tolist()
    for kind in (range(kept), range(kept, n)):  # no image twice before all were there once
        of_kind = [sample for sample in shown if sample in kind]
        counts = Counter(of_kind)
        assert max(counts.values()) - min(counts[sample] for sample in kind) <= 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "build",
    [
        *[lambda *a, w=w, **k: TorchLoader(*a, workers=w, **k) for w in (0, 1, 3)],
        pytest.param(lambda *a, **k: DALILoader(*a, threads=1, **k), marks=needs_dali),
    ],
    ids=["torch-0", "torch-1", "torch-3", "dali"],
)
def test_every_loader_gives_the_same_batches_from_any_step_on(build):
    images = partly_labelled(40, 7)
    options = {"seed": 5, "train": True, "pad": 2, "sampler": MixedSampler(images.labels, 8, 5)}
    resident, loader = ResidentLoader(images, 8, **options), build(images, 8, **options)
    assert loader.unlabelled == resident.unlabelled == 34
    for start in (0, 3):
        for step, (pixels, labels) in enumerate(loader.epoch(2, start), start):
            expected, expected_labels = resident.batch(2, step)
            assert torch.equal(labels, expected_labels)
            assert (labels == IGNORED).sum() == 5
            assert torch.equal(images.labels[loader.samples(2, step)], labels)
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    assert step == 4


def test_an_image_that_comes_twice_is_augmented_twice():
    images = partly_labelled(40, 20)  # two labelled images
    sampler = MixedSampler(images.labels, 8, 4)
    loader = ResidentLoader(images, 8, seed=1, train=True, pad=3, sampler=sampler)
    pixels, _ = loader.batch(0, 0)
    shown = loader.samples(0, 0)
    twice = pixels[shown == 0]
    assert len(twice) == 2
    assert not torch.equal(*twice)


@pytest.mark.parametrize(
    ("labels", "unlabelled", "message"),
    [
        ([0, 1], 1, "2 images with and 0 without a label"),
        ([-100, -100], 1, "0 images with and 2 without a label"),
        ([0, -100], 2, "2 unlabelled of 2 images in a batch: give 1 to 1"),
    ],
)
def test_mistakes_are_one_line(labels, unlabelled, message):
    with pytest.raises(InputError, match=message):
        MixedSampler(torch.tensor(labels), 2, unlabelled)
    images = partly_labelled(40, 7)
    with pytest.raises(InputError, match="batch size 4 for a sampler of 8"):
        ResidentLoader(images, 4, train=True, sampler=MixedSampler(images.labels, 8, 5))


def test_a_set_with_images_without_labels():
    images = partly_labelled(40, 2)
    some = images.subset(11)
    assert {*some.labels.tolist()} >= {IGNORED}
    with pytest.raises(InputError, match=r"labels run from -1 to .*without a label: -100"):
        replace(images, labels=images.labels.where(images.labels != IGNORED, -1))
