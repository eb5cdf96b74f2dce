"""Labelled files: decoded alike by every loader, measured, and chosen from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdml.data import ImageFiles, ImageSet, ResidentLoader, TorchLoader, image_files, make_loader
from fastdml.data.files.decode import BadImage, decode
from fastdml.data.loaders import make
from fastdml.errors import InputError

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is absent")


@pytest.fixture
def files(tmp_path):
    """Twelve images of other sizes and modes, of three classes."""
    random, paths = np.random.default_rng(0), []
    for i in range(12):
        height, width = 20 + 3 * i, 50 - 2 * i
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        paths.append(str(tmp_path / f"{i}.png"))
        image.convert(("RGB", "L", "RGBA", "P")[i % 4]).save(paths[-1])
    names = ("ant", "bee", "cat")
    return ImageFiles(tuple(paths), torch.arange(12) % 3, names, (16, 16), (90.0,) * 3, (40.0,) * 3)


def test_all_at_once(files):
    images = files.decode()
    assert isinstance(images, ImageSet)
    assert images.pixels.shape == (12, 16, 16, 3)
    for pixels, path in zip(images.pixels, files.paths, strict=True):
        assert np.array_equal(pixels.numpy(), decode(path, (16, 16), "crop"))
    assert torch.equal(images.labels, files.labels)
    assert (images.class_names, images.mean) == (files.class_names, files.mean)
    assert files.decode((8, 12)).images.shape == (12, 3, 8, 12)


def test_a_bad_file_is_named(files):
    with open(files.paths[5], "wb") as file:
        file.write(b"no image")
    with pytest.raises(BadImage, match=r"5\.png: not an image that can be decoded"):
        files.decode()
    loader = TorchLoader(files, 4, train=False, workers=0)
    with pytest.raises(InputError, match=r"5\.png: not an image that can be decoded"):
        list(loader.epoch(0))


@pytest.mark.parametrize("options", [{}, {"train": True, "pad": 2, "flip": True, "seed": 3}])
def test_in_memory_or_streamed_the_batches_are_the_same(files, options):
    options = {"train": False, **options}
    resident, streamed = (kind(files, 5, **options) for kind in (ResidentLoader, TorchLoader))
    assert resident.resize == streamed.resize == "crop"
    assert resident.paths == streamed.paths == files.paths
    for (ours, labels), (theirs, same) in zip(resident.epoch(1), streamed.epoch(1), strict=True):
        assert ours.shape[1:] == (3, 16, 16)
        assert torch.equal(ours, theirs)
        assert torch.equal(labels, same)


def test_batches_are_those_of_torchvision(files):
    """A plain data set, its transforms, a DataLoader: what a user would write."""
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    steps = v2.Compose([
        v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32),
        v2.Normalize(files.mean, files.std),
    ])  # fmt: skip
    theirs = torch.stack([steps(Image.open(path).convert("RGB")) for path in files.paths])
    ours = torch.cat([images for images, _ in ResidentLoader(files, 5, train=False).epoch(0)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # a division, or its inverse


def test_statistics_are_those_of_the_pixels(files, monkeypatch):
    pixels = files.decode().pixels.reshape(-1, 3).double()
    mean, std = files.statistics()
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(0))
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std(0, correction=0))
    monkeypatch.setattr(image_files, "MEASURED", 3)  # one of each class, always the same
    some = files.statistics()
    assert some == files.statistics() == files.subset(3).statistics()
    assert some != (mean, std)


def test_statistics_of_one_colour_divide_by_no_zero(tmp_path):
    for name in "ab":
        Image.new("RGB", (4, 4), (7, 0, 255)).save(tmp_path / f"{name}.png")
    paths = tuple(str(tmp_path / f"{name}.png") for name in "ab")
    files = ImageFiles(paths, torch.tensor([0, 1]), ("a", "b"), (4, 4))
    assert files.statistics() == ((7.0, 0.0, 255.0), (1.0, 1.0, 1.0))


def test_own_size(tmp_path, files, monkeypatch):
    assert files.own_size() is None  # they differ
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"same{i}.png"))
        Image.new("L", (40, 28)).save(paths[-1])
    same = ImageFiles(tuple(paths), torch.arange(4) % 2, ("a", "b"), (16, 16))
    assert same.own_size() == (28, 40)
    monkeypatch.setattr(image_files, "SMALL", 39)
    assert same.own_size() is None  # larger than what is left as it is


def test_parts(files):
    some = files.at(torch.tensor([7, 2]))
    assert (some.paths, some.labels.tolist()) == ((files.paths[7], files.paths[2]), [1, 2])
    assert len(files.without({files.paths[0]: "bad"})) == 11
    assert files.without({}) is files
    chosen = files.subset(6, seed=4)
    assert chosen.labels.bincount().tolist() == [2, 2, 2]
    assert chosen.size == files.size


def test_what_does_not_fit_is_streamed(files, monkeypatch, caplog):
    """Never by DALI, whose pictures would be others."""
    monkeypatch.setattr(make, "has_dali", lambda: True)
    assert isinstance(make_loader("auto", files, 4, train=True), ResidentLoader)
    need = make.needed_bytes(files, torch.device("cpu"), train=True)
    assert need == 12 * 16 * 16 * 3 * (1 + 1.5 * 2)  # the pixels, and their rows twice with borders
    monkeypatch.setattr(make, "free_bytes", lambda device: 2 * need - 2)
    with caplog.at_level("INFO", "fastdml"):
        assert isinstance(make_loader("auto", files, 4, train=True), TorchLoader)
    assert "streamed by torch" in caplog.text
    with pytest.raises(InputError, match=r"DALI would make other pictures .*: set loader to auto"):
        make_loader("dali", files, 4, train=True)
