"""The division of a training set into images to train and to validate on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_image_set import labelled

from fastdml.data import load_digits, split_validation
from fastdml.data.validation import validation_places
from fastdml.errors import InputError


def places(part) -> list[int]:
    """Which images of a set of `labelled` these are."""
    return part.images.flatten().tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.data())
def test_each_image_is_on_one_side_and_each_class_gives_its_share(labels, data):
    whole = labelled(torch.tensor(labels), 5)
    sizes = torch.bincount(whole.labels, minlength=5)
    fewest, most = max(int((sizes > 1).sum()), 1), len(labels) - int((sizes > 0).sum())
    if most < fewest:
        return
    n = data.draw(st.integers(fewest, most))
    seed = data.draw(st.integers(0, 5))
    train, validation = split_validation(whole, n, seed)
    assert len(validation) == n
    assert sorted(places(train) + places(validation)) == list(range(len(labels)))
    assert places(validation) == sorted(places(validation))
    assert torch.equal(validation.labels, whole.labels[places(validation)])
    for c in range(5):
        own = int((validation.labels == c).sum())
        assert own >= (sizes[c] > 1)
        assert own <= max(sizes[c] - 1, 0)
    again = split_validation(whole, n, seed)[1]
    assert places(again) == places(validation)
    if n < most:
        assert {*places(validation)} <= {*places(split_validation(whole, n + 1, seed)[1])}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_real_classes_keep_their_proportions(share):
    train = load_digits()[0]
    kept, held = split_validation(train, share)
    assert len(held) == round(share * len(train))
    wanted = share * torch.bincount(train.labels)
    assert (torch.bincount(held.labels) - wanted).abs().max() <= 1.5
    assert len(kept) + len(held) == len(train)
    assert held.mean == kept.mean == train.mean


def test_another_seed_is_another_division():
    labels = torch.arange(200) % 4
    assert not torch.equal(validation_places(labels, 40, 0), validation_places(labels, 40, 1))


def test_known_division():
    """Runs go on with the division that they began with, also under a later version."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    assert validation_places(labels, 4, 0).tolist() == [2, 5, 7, 9]


def test_a_class_of_one_image_keeps_it_for_training(caplog):
    whole = labelled(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    train, validation = split_validation(whole, 2)
    assert sorted(validation.labels.tolist()) == [0, 2]
    assert 1 in train.labels
    assert "no validation images of classes with a single image: 1" in caplog.text


@pytest.mark.parametrize(
    ("validation", "pattern"),
    [
        (1, "validation=1 is 1 of 40 images, for 4 classes: give at least 4, one of each class"),
        (0.01, "validation=0.01 is 0 of 40 images, for 4 classes: give at least 4"),
        (37, "validation=37 is 37 of 40 images: give at most 36, so that each class keeps"),
        (0.99, "validation=0.99 is 40 of 40 images: give at most 36"),
        (10**9, "validation=1e.09 is 1,000,000,000 of 40 images: give at most 36"),
    ],
)
def test_too_few_and_too_many_are_one_line(validation, pattern):
    with pytest.raises(InputError, match=pattern) as error:
        split_validation(labelled(torch.arange(40) % 4, 4), validation)
    assert "\n" not in str(error.value)


def test_one_image_of_each_class_is_enough():
    train, validation = split_validation(labelled(torch.arange(40) % 4, 4), 4)
    assert sorted(validation.labels.tolist()) == [0, 1, 2, 3]
    assert len(train) == 36


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_torch_change_nothing(dtype):
    labels = torch.arange(3000, device="cpu") % 7
    expected = validation_places(labels, 0.3, 0)
    data = load_digits()[0]
    held = split_validation(data, 0.1)[1].labels
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert torch.equal(validation_places(labels, 0.3, 0), expected)
            assert torch.equal(split_validation(data, 0.1)[1].labels, held)
    finally:
        torch.set_default_dtype(before)
