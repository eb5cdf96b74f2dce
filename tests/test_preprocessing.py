"""What prepares an image gives the bits that evaluation during training saw."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdml import data
from fastdml.data import ReidSplit, ResidentLoader, make_loader
from fastdml.errors import InputError
from fastdml.preprocessing import Preprocessing, stacked

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def photo(height: int, width: int, seed: int = 0):
    """Smooth colours with some noise, as photographs have them."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-9, 10, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


def of_loader(loader) -> dict:
    images, _ = next(iter(loader.epoch(0)))
    return {
        "image_shape": [*images.shape[1:]],
        "mean": [*loader.mean],
        "std": [*loader.std],
        "resize": loader.resize,
        "stored": loader.stored,
    }


@pytest.mark.parametrize("kind", ["path", "picture", "array"])
def test_digits(tmp_path, kind):
    test = data.load("digits")[1]
    loader = ResidentLoader(test, 50, train=False)
    prepare = Preprocessing(of_loader(loader))
    prepared = []
    for k, pixels in enumerate(test.pixels[:50, ..., 0].numpy()):
        path = tmp_path / f"{k}.png"
        Image.fromarray(pixels).save(path)
        image = {"path": path, "picture": Image.open(path), "array": pixels}[kind]
        prepared.append(prepare(image))
    images, _ = loader.batch(0, 0)
    assert torch.equal(stacked(prepared), images)
    assert stacked(prepared).is_contiguous(memory_format=torch.channels_last)


def test_cifar(tmp_path):
    """With its normalisation; the real images are as random as these."""
    known = data.dataset("cifar100")
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    images = data.ImageSet.from_pixels(
        pixels, torch.zeros(20, dtype=torch.int64), known.classes, known.mean, known.std
    )
    loader = ResidentLoader(images, 20, train=False)
    prepare = Preprocessing(data.record("cifar100"))
    for k, image in enumerate(pixels.numpy()):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    prepared = [prepare(str(tmp_path / f"{k}.png")) for k in range(20)]
    assert torch.equal(stacked(prepared), loader.batch(0, 0)[0])


@pytest.mark.parametrize("stored", [(128, 64), (60, 70)])
@pytest.mark.parametrize("size", [(256, 128), (128, 64), (40, 24)])
def test_files_of_reidentification(tmp_path, size, stored):
    shapes = [(128, 64), (130, 60), (300, 300), (40, 90)]
    paths = []
    for k, shape in enumerate(shapes):
        paths.append(str(tmp_path / f"{k}.jpg"))
        photo(*shape, seed=k).save(paths[-1])
    split = ReidSplit(tuple(paths), torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2, 1, 2]))
    split = replace(split, size=stored)
    loader = make_loader("resident", split, 4, train=False, size=size)
    prepare = Preprocessing(of_loader(loader))
    assert torch.equal(stacked([prepare(path) for path in paths]), loader.batch(0, 0)[0])
    pictures = [prepare(Image.open(path)) for path in paths]
    assert torch.equal(stacked(pictures), loader.batch(0, 0)[0])


@pytest.mark.parametrize("resize", ["crop", None])
@pytest.mark.parametrize("shape", [(90, 130), (130, 90), (33, 32), (20, 25), (32, 32)])
def test_torchvision_prepares_the_same(tmp_path, shape, resize):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    mean, std = [120.0, 110.0, 100.0], [60.0, 61.0, 62.0]
    usual = v2.Compose(
        [
            v2.Resize(32),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize(mean, std),
        ]
    )
    path = tmp_path / "photo.png"
    photo(*shape).save(path)
    record = {"image_shape": [3, 32, 32], "mean": mean, "std": std, "resize": resize}
    found, expected = Preprocessing(record)(path), usual(Image.open(path))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_orientation_and_grey():
    record = {"image_shape": [1, 4, 6], "mean": [0.0], "std": [1.0], "resize": None}
    prepare = Preprocessing(record)
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert torch.equal(prepare(values)[0], torch.from_numpy(values).float())
    assert torch.equal(prepare(values[..., None]), prepare(values))
    assert torch.equal(prepare(values[:, ::-1].copy()), prepare(values).flip(2))
    turned = Image.fromarray(values.T.copy())
    turned.getexif()[274] = 5  # transposed
    assert torch.equal(prepare(turned), prepare(values))
    colour = np.full((4, 6, 3), (255, 0, 0), dtype=np.uint8)
    assert prepare(colour).unique().tolist() == [76.0]


def test_what_is_no_image(tmp_path):
    record = {"image_shape": [3, 8, 8], "mean": [0.0] * 3, "std": [1.0] * 3, "resize": "crop"}
    prepare = Preprocessing(record)
    for wrong, message in (
        (np.zeros((8, 8, 3)), r"of uint8, not \(8, 8, 3\) of float64"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\) is no image of 1, 3 or 4 channels"),
        (np.zeros((0, 8, 3), np.uint8), r"not \(0, 8, 3\)"),
        (torch.zeros(3, 8, 8), "not a Tensor"),
        (None, "not a NoneType"),
        (tmp_path / "none.png", "none.png: the file is not there"),
        (tmp_path, "not a file"),
    ):
        with pytest.raises(InputError, match=message) as error:
            prepare(wrong)
        assert "\n" not in str(error.value)
    large = Preprocessing(record | {"image_shape": [3, 300, 300]})
    with pytest.raises(InputError, match="90000x1 pixels are too narrow for 300x300"):
        large(photo(2, 9000).resize((90000, 1)))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a file"):
        prepare(tmp_path / "pipe.png")


def test_other_channels_are_arrays_of_the_shape():
    record = {"image_shape": [5, 4, 4], "mean": [1.0] * 5, "std": [2.0] * 5, "resize": None}
    prepare = Preprocessing(record)
    pixels = np.arange(80, dtype=np.uint8).reshape(4, 4, 5)
    assert torch.equal(prepare(pixels), (torch.from_numpy(pixels).float().permute(2, 0, 1) - 1) / 2)
    for wrong in (pixels[:3], "a.png", photo(4, 4)):
        with pytest.raises(InputError, match=r"5 channels, which are prepared as an array \(4, 4"):
            prepare(wrong)


def test_units_that_differ_are_told_once(caplog):
    record = {"image_shape": [1, 8, 8], "mean": [4.9], "std": [6.0], "resize": None}
    prepare = Preprocessing(record)
    prepare(np.full((8, 8), 16, dtype=np.uint8))
    assert not caplog.records
    for _ in range(2):
        prepare(np.full((8, 8), 255, dtype=np.uint8))
    assert len(caplog.records) == 1
    assert "from 255 to 255" in caplog.text


def test_what_is_not_recorded_is_named():
    with pytest.raises(InputError, match=r"the mean and std of the images .* are not recorded"):
        Preprocessing({"image_shape": [3, 8, 8], "mean": None, "std": None, "classes": None})
