"""Resident, DALI and torch: the same batches, in the same protocol, and the same refusals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastdml.data import (
    DALILoader,
    PKSampler,
    ResidentLoader,
    TorchLoader,
    load_cifar100,
    loaders,
    make_loader,
)
from fastdml.data.dali import checked
from fastdml.errors import InputError, MissingExtra

MARKET = {"size": (256, 128), "pad": 10, "padding": "black", "erase": 0.5}
# of a batch normalised by ImageNet's deviations: rounding alone, and that of weights to 1/256
EXACT, RESIZED = 1e-5, 0.02

needs_dali = pytest.mark.skipif(not loaders.has_dali(), reason="DALI is not installed")
both = pytest.mark.parametrize(
    "make",
    [pytest.param(DALILoader, marks=needs_dali), lambda *a, **k: TorchLoader(*a, workers=0, **k)],
    ids=["dali", "torch"],
)


def close(loader, found, expected, tolerance) -> bool:
    if isinstance(loader, TorchLoader):
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= tolerance)


@both
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"train": True, **MARKET}, EXACT),
        ({"train": False, "size": (256, 128)}, EXACT),
        ({"train": True, **MARKET, "erase": 1.0, "cutout": 40, "flip": False}, EXACT),
        ({"train": True, **MARKET, "size": (200, 100)}, RESIZED),
        ({"train": True, "size": (128, 64), "pad": 0, "padding": "black"}, EXACT),
    ],
)
def test_market_batches_are_the_resident_ones(market, make, options, tolerance):
    sampler = PKSampler(market.train.ids, 4, 4, market.train.cameras) if options["train"] else None
    resident = ResidentLoader(market.train.decode(), 16, seed=3, sampler=sampler, **options)
    loader = make(market.train, 16, seed=3, sampler=sampler, **options)
    assert len(loader) == len(resident) == 8
    assert loader.num_classes == 8
    for step, (images, labels) in zip(range(2), loader.epoch(1), strict=False):
        expected = resident.batch(1, step)
        assert torch.equal(labels, expected[1])
        assert images.shape == expected[0].shape
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert close(loader, images, expected[0], tolerance)


@both
@pytest.mark.parametrize("train", [True, False])
def test_cifar_batches_are_the_resident_ones(cifar100_root, make, train):
    images = load_cifar100(cifar100_root)[0].subset(300)
    resident = ResidentLoader(images, 64, seed=1, train=train)
    loader = make(images, 64, seed=1, train=train)
    found = list(loader.epoch(2))
    assert len(found) == len(loader) == len(resident) == (4 if train else 5)
    for step, (pixels, labels) in enumerate(found):
        expected = resident.batch(2, step)
        assert torch.equal(labels, expected[1])
        assert close(loader, pixels, expected[0], EXACT)


@both
def test_resuming_and_leaving(market, make):
    """The rest of an epoch is the same, bit for bit, from a fresh loader and from one that was left
    in the middle of another epoch."""
    options = {"train": True, **MARKET, "seed": 7}
    first = make(market.train, 16, **options)
    whole = [images.clone() for images, _ in first.epoch(4)]
    second = make(market.train, 16, **options)
    next(iter(second.epoch(0)))
    for loader in (make(market.train, 16, **options), second, first):
        rest = [images for images, _ in loader.epoch(4, 5)]
        assert len(rest) == 3
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


@both
def test_ranks_share_an_epoch(market, make):
    seen = []
    for rank in range(2):
        loader = make(market.train, 16, train=True, **MARKET, rank=rank, world=2)
        assert len(loader) == 4
        seen += [
            sample
            for step in range(4)
            for sample in loader.order(0).sample[loader.part(0, step)].tolist()
        ]
        _, labels = next(iter(loader.epoch(0)))
        assert torch.equal(labels, market.train.labels[seen[-64:-48]])
    assert sorted(seen) == list(range(128))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_from_the_torch_loader(standin_copy, market, workers):
    split = market.train
    paths = tuple(str(standin_copy / "bounding_box_train" / Path(p).name) for p in split.paths)
    split = type(split)(paths, split.ids, split.cameras)
    loader = TorchLoader(split, 16, train=True, **MARKET, workers=workers)
    gone = paths[int(loader.order(0).sample[20])]
    os.unlink(gone)
    with pytest.raises(InputError) as error:
        list(loader.epoch(0))
    assert f"{gone}: the file is not there" in str(error.value)
    assert "\n" not in str(error.value)


@needs_dali
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_vanishes_from_dali(standin_copy, market, damage):
    split = market.train
    paths = tuple(str(standin_copy / "bounding_box_train" / Path(p).name) for p in split.paths)
    split = type(split)(paths, split.ids, split.cameras)
    loader = DALILoader(split, 16, train=True, **MARKET)
    whole = [images for images, _ in loader.epoch(1)]
    spoilt = Path(paths[int(loader.order(1).sample[20])])
    content = spoilt.read_bytes()
    spoilt.unlink()
    if damage == "cut":
        spoilt.write_bytes(content[:800])
    with pytest.raises(InputError) as error:
        list(loader.epoch(1))
    assert str(spoilt) in str(error.value)
    assert "\n" not in str(error.value)
    spoilt.write_bytes(content)  # restored: training goes on where it was
    assert all(torch.equal(a, b) for (a, _), b in zip(loader.epoch(1, 1), whole[1:], strict=True))


@needs_dali
def test_what_dali_refuses_is_found_before(standin_copy, market, capsys):
    split = market.train
    paths = [str(standin_copy / "bounding_box_train" / Path(p).name) for p in split.paths]
    spoilt = Path(paths[9])
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:2] + b"\xff\x00" + content[2:])  # Pillow reads on, DALI does not
    split = type(split)(tuple(paths), split.ids, split.cameras)
    with pytest.raises(InputError, match=r"1 of 128 files are bad.*DALI cannot decode it") as error:
        checked(split, "error")
    assert str(spoilt) in str(error.value)
    assert len(checked(split, "skip")) == 127
    assert str(spoilt) in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["resident", "torch", pytest.param("dali", marks=needs_dali)])
def test_make_loader(market, kind, capsys):
    loader = make_loader(kind, market.train, 16, train=True, **MARKET)
    images, labels = next(iter(loader.epoch(0)))
    assert images.shape == (16, 3, 256, 128)
    assert labels.shape == (16,)
    told = capsys.readouterr().err
    assert told == ("128 images stay in memory: 3 MB\n" if kind == "resident" else "")


def test_what_does_not_fit_is_streamed(market, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "free_bytes", lambda device: 4_000_000)
    for dali, kind in ((True, DALILoader), (False, TorchLoader)):
        if dali and not loaders.has_dali():
            continue
        monkeypatch.setattr(loaders, "has_dali", lambda dali=dali: dali)
        assert type(make_loader("auto", market.train, 16, train=True, **MARKET)) is kind
        told = capsys.readouterr().err
        assert told.startswith("128 images would take 3 MB, more than 50% of the 4 MB free")
        assert told.count("\n") == 1


def test_what_is_wrong_is_named(market, make_set, monkeypatch):
    with pytest.raises(InputError, match="loader 'ffcv': give one of auto, resident, dali, torch"):
        make_loader("ffcv", make_set(), 5, train=True)
    if loaders.has_dali():
        with pytest.raises(InputError, match="give the size"):
            DALILoader(market.train, 16, train=True, padding="black")
        with pytest.raises(InputError, match="no border by reflection"):
            DALILoader(market.train, 16, train=True, size=(256, 128))
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastdml\[dali\]'"):
        DALILoader(make_set(), 5, train=True)
