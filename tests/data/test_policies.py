"""TrivialAugment and RandAugment: torchvision's pictures, the same whoever makes them."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from image_sets import random_set
from PIL import Image

from fastdml.data import PKSampler, RepeatedSampler, TorchLoader, load_digits, make_loader, policies
from fastdml.errors import InputError, MissingExtra

v2 = pytest.importorskip("torchvision.transforms.v2")

both = pytest.mark.parametrize("policy", ["trivial", "rand"])


@pytest.fixture
def images():
    return random_set(20, 3, 16, 12)


def batches(source, policy, epoch=0, start=0, workers=0, **options):
    options = {"seed": 3, "train": True, "pad": 2, **options}
    loader = TorchLoader(source, 8, policy=policy, workers=workers, **options)
    return [images for images, _ in loader.epoch(epoch, start)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@both
def test_an_image_is_that_of_torchvision(policy, images):
    """Ten lines of plain torchvision."""
    transform = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[policy]()
    for seed, image in enumerate(images.pixels.numpy()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = np.asarray(transform(Image.fromarray(image)))
        assert np.array_equal(policies.apply(policy, image, seed), expected)


@both
def test_batches_do_not_depend_on_workers_or_on_where_a_run_resumes(policy, images):
    alone = batches(images, policy, epoch=1)
    assert equal(batches(images, policy, epoch=1, workers=1), alone)
    assert equal(batches(images, policy, epoch=1, workers=2), alone)
    assert equal(batches(images, policy, epoch=1, start=1, workers=1), alone[1:])


@both
def test_each_epoch_seed_and_repetition_has_its_own(policy, images):
    plain = batches(images, None)
    found = batches(images, policy)
    assert not equal(found, plain)
    assert not equal(found, batches(images, policy, seed=4))
    # eight times one image, each shown four times an epoch, without crop and mirror
    one = dataclasses.replace(
        images, images=images.images[:1].repeat(8, 1, 1, 1), labels=images.labels[:8]
    )
    same = {"pad": 0, "flip": False, "sampler": RepeatedSampler(8, 4)}
    shown = torch.cat([*batches(one, policy, **same), *batches(one, policy, 1, **same)])
    assert len({image.numpy().tobytes() for image in shown}) > 8


def test_crop_and_mirror_come_after_it(images):
    moved = batches(images, "trivial")
    still = batches(images, "trivial", pad=0, flip=False)
    assert not equal(moved, still)
    for a, b in zip(moved, still, strict=True):
        assert a.shape == b.shape


def test_torchs_global_generator_is_left_alone(images):
    before = torch.get_rng_state()
    batches(images, "rand")
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_has_no_policy(images):
    assert equal(batches(images, "trivial", train=False), batches(images, None, train=False))


def test_digits_of_sixteen_shades_keep_their_range():
    digits, _ = load_digits()
    assert digits.white == 16
    shown = np.stack([
        policies.apply("trivial", image, seed, digits.white)
        for seed, image in enumerate(digits.pixels[:200].numpy())
    ])  # fmt: skip
    assert shown.max() == 16
    assert shown.shape == (200, 8, 8, 1)
    assert shown.mean() > 2  # posterised as if 16 were nearly black, most would be black
    unchanged = [
        np.array_equal(a, b) for a, b in zip(shown, digits.pixels[:200].numpy(), strict=True)
    ]
    assert any(unchanged)  # "identity" is among the policies, and scaling to 255 and back is exact


def test_the_loader_is_chosen_and_says_why(images, caplog):
    caplog.set_level(logging.INFO, "fastdml")
    loader = make_loader("auto", images, 8, train=True, policy="rand")
    assert isinstance(loader, TorchLoader)
    assert "augment rand takes an image at a time: streamed by torch" in caplog.text


@pytest.mark.parametrize("kind", ["resident", "dali"])
def test_other_loaders_do_not_have_it(images, kind):
    with pytest.raises(InputError, match=f"not by the {kind} loader: set loader to auto or torch"):
        make_loader(kind, images, 8, train=True, policy="rand")


def test_what_no_policy_takes(images):
    two = random_set(8, 2)
    with pytest.raises(InputError, match="images of 1 or 3 channels, not of 2"):
        TorchLoader(two, 4, train=True, policy="rand")
    with pytest.raises(InputError, match="policy 'randd': give one of trivial, rand"):
        TorchLoader(images, 4, train=True, policy="randd")


def test_without_torchvision_it_is_one_line(images, monkeypatch):
    policies._transform.cache_clear()

    def missing(module):
        raise ModuleNotFoundError(name="torchvision")

    monkeypatch.setattr("fastdml.errors.importlib.import_module", missing)
    with pytest.raises(MissingExtra, match=r"torchvision is not installed: .*fastdml\[images\]"):
        TorchLoader(images, 4, train=True, policy="rand")


def test_identities_are_sampled_as_without(images):
    labels = torch.arange(20) % 5
    source = dataclasses.replace(images, labels=labels)
    sampler = PKSampler(labels, 4, 2)
    loader = TorchLoader(source, 8, train=True, policy="rand", workers=0, sampler=sampler)
    found, shown = next(loader.epoch(0))
    assert found.shape == (8, 3, 16, 12)
    assert sorted(shown.bincount(minlength=5).tolist()) == [0, 2, 2, 2, 2]
