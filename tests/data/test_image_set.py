from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import random_set

from fastdml.data import ImageSet, ResidentLoader, TorchLoader, load
from fastdml.errors import InputError


def labelled(labels: torch.Tensor, classes: int) -> ImageSet:
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).to(torch.uint8)
    return ImageSet(images, labels, classes, tuple(map(str, range(classes))), (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(50, 3, 8, 8)}, "float32: give .* uint8"),
        ({"images": torch.zeros(50, 8, 8, dtype=torch.uint8)}, r"\(50, 8, 8\)"),
        ({"labels": torch.zeros(50, dtype=torch.int32)}, "int32 for 50 images"),
        ({"labels": torch.zeros(49, dtype=torch.int64)}, r"\(49,\) .* for 50 images"),
        ({"labels": torch.full((50,), 10)}, "from 10 to 10: with 10 classes .* 0 to 9"),
        ({"labels": torch.full((50,), -1)}, "from -1 to -1"),
        ({"class_names": ("one",)}, "1 class names for 10 classes"),
        ({"mean": (1.0,)}, "for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "std above zero"),
        (
            {
                "images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
                "labels": torch.zeros(0, dtype=torch.int64),
            },
            "no images",
        ),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(InputError, match=message) as error:
        replace(random_set(), **change)
    assert "\n" not in str(error.value)


def test_repr_does_not_print_pixels():
    assert len(repr(random_set())) < 400


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data())
def test_subset_is_balanced_and_nested(labels, data):
    whole = labelled(torch.tensor(labels), 5)
    n = data.draw(st.integers(1, len(labels)))
    seed = data.draw(st.integers(0, 5))
    part = whole.subset(n, seed)
    assert len(part) == n
    chosen = part.images.flatten().tolist()
    assert chosen == sorted(set(chosen))  # in the set's order, none twice
    assert torch.equal(part.labels, whole.labels[chosen])
    had, got = (torch.bincount(s.labels, minlength=5) for s in (whole, part))
    unfinished = got[got < had]  # classes with samples left over
    if len(unfinished):
        assert got.max() - unfinished.min() <= 1
    if n > 1:
        assert set(whole.subset(n - 1, seed).images.flatten().tolist()) < set(chosen)


def test_subset_depends_on_the_seed_alone():
    whole = labelled(torch.arange(200) % 10, 10)
    assert torch.equal(whole.subset(50, 1).images, whole.subset(50, 1).images)
    assert not torch.equal(whole.subset(50, 1).images, whole.subset(50, 2).images)
    assert torch.bincount(whole.subset(50, 1).labels).tolist() == [5] * 10


@pytest.mark.parametrize("n", [0, -3, 51])
def test_subset_of_an_impossible_size(n):
    with pytest.raises(InputError, match=rf"subset of {n} images: the set allows 1 to 50"):
        random_set().subset(n)


def test_pixels_are_the_images_without_a_copy():
    pixels = torch.randint(256, (6, 4, 5, 3), dtype=torch.uint8)
    images = ImageSet.from_pixels(pixels, torch.arange(6) % 2, ("a", "b"), (0.0,) * 3, (1.0,) * 3)
    assert images.images.shape == (6, 3, 4, 5)
    assert images.images.data_ptr() == images.pixels.data_ptr() == pixels.data_ptr()
    assert torch.equal(images.images[1, 2], pixels[1, :, :, 2])
    assert images.subset(3).pixels.is_contiguous()
    loader = ResidentLoader(images, 2, train=True, pad=0, size=(8, 10))
    assert loader.images.data_ptr() == pixels.data_ptr()


def test_other_memory_formats_give_the_same_batches():
    images = random_set(ch=3)
    planar = replace(images, images=images.images.contiguous())
    beside = ImageSet.from_pixels(
        images.pixels.contiguous(), images.labels, images.class_names, images.mean, images.std
    )
    for kind, options in ((ResidentLoader, {}), (TorchLoader, {"workers": 0})):
        first, second = (
            kind(each, 4, train=True, pad=2, **options).batch(0, 0)[0] for each in (planar, beside)
        )
        assert torch.equal(first, second)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown data set 'cifar-100': did you mean cifar100"):
        load("cifar-100")
    with pytest.raises(InputError, match="give one of digits, cifar10, cifar100"):
        load("imagenet")
