"""A folder as a reader of the documentation would have it, with data small enough for a test: CIFAR
in the official files' format, Market-1501's layout, and a folder of images of one's own."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastdml.data import ImageSet
from fastdml.data.sets import cifar
from fastdml.data.sets.stand_in import StandIn, build_standin

SOURCES = {  # 30 images of a class to train on, 2 to test
    "CIFAR10": replace(cifar.CIFAR10, train_records=60, test_records=20),
    "CIFAR100": replace(cifar.CIFAR100, train_records=3000, test_records=200),
}
MARKET = StandIn(train_ids=16, test_ids=6, images=12, junk=4, distractors=6)
CLASSES = ("cat", "dog", "red panda")


def write_cifar(source: cifar.Source, root: Path) -> None:
    """The binary version, where a class has a colour of its own."""
    folder = root / source.binary_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    classes = len(source.class_names)
    colours = random.integers(0, 200, (classes, 3, 1))
    for name in source.files:
        count = source.test_records if name == source.test else source.train_records
        labels = np.arange(count) % classes
        pixels = colours[labels] + random.integers(0, 56, (count, 3, 1024))
        coarse = [labels % 20] if len(source.label_ranges) == 2 else []
        records = [*(column[:, None] for column in (*coarse, labels)), pixels.reshape(count, -1)]
        np.concatenate(records, axis=1).astype(np.uint8).tofile(folder / f"{name}.bin")


def write_market(root: Path) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(20 * 100) % 100
    images = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=random)
    names = tuple(map(str, range(100)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_standin(root, ImageSet(images, labels, 100, names, (128.0,) * 3, (64.0,) * 3), MARKET)


def write_photos(root: Path, per_class: int = 10) -> None:
    """Class folders; a class has a colour of its own, and images differ in size."""
    from PIL import Image

    random = np.random.default_rng(0)
    for k, class_name in enumerate(CLASSES):
        folder = root / class_name
        folder.mkdir(parents=True)
        for number in range(per_class):
            height, width = random.integers(40, 80, 2)
            pixels = random.integers(0, 120, (height, width, 3))
            pixels[..., k] += 130
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.jpg")


def write_people(root: Path) -> None:
    """A re-identification set of one's own: SPLIT/IDENTITY/camCAMERA-NUMBER.jpg."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "query", "gallery"):
        identities = range(4) if split == "train" else range(4, 7)
        for identity in identities:
            folder = root / split / f"{identity:04}"
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = random.integers(0, 256, (40, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"cam{1 + number % 3}-{number:02}.jpg")
