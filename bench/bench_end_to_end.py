"""One epoch of training, from stored images to updated weights.

Ours is `fastdml.train.fit` as a user calls it, with its loader set up, its log, its checkpoint and
its weights written; the usual loop is a DataLoader of per-image transforms in two workers feeding
the pairwise loop. On CIFAR-100 where its folder is there (--data), otherwise on random images,
which the table says. Quick set: two ResNet-32 and 640 images on a CPU (half a minute), 6,400 on
CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from bench import timing
from bench.baselines import data_loader, pairwise
from bench.conftest import chosen_device
from fastdml import Cohort, train
from fastdml.data import ImageSet, ResidentLoader, load_cifar100
from fastdml.errors import MissingExtra

PEERS = ("resnet32", "resnet32")
BATCH = 64
ROUNDS = 3
IMAGES = {"cpu": 640, "cuda": 6_400}
FULL_IMAGES = {"cpu": 10_000, "cuda": 50_000}


def _images(root: str, count: int) -> tuple[ImageSet, str]:
    if any(Path(root).glob("cifar-100*")):
        return load_cifar100(root)[0].subset(count), "CIFAR-100"
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (count,), generator=generator)
    names = tuple(map(str, range(100)))
    images = ImageSet(made, labels, 100, names, mean=(128.0,) * 3, std=(64.0,) * 3)
    return images, f"random, since there is no CIFAR-100 in {root!r}"


def _usual_epoch(images: ImageSet, device: torch.device) -> float:
    """Seconds, workers' start included."""
    cohort = Cohort(PEERS, images.num_classes).to(device).train()
    loop = pairwise.Loop(
        cohort.peers,
        lambda w: torch.optim.SGD(w, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    )
    batches = data_loader.loader(images, BATCH, device)
    timing.wait(device)
    start = time.perf_counter()
    for x, y in batches:
        loop(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
    timing.wait(device)
    return time.perf_counter() - start


def _our_epoch(images: ImageSet, device: torch.device) -> float:
    """Seconds: the loader's layout of the images, the epoch, and all that a run writes in it."""
    cohort = Cohort(PEERS, images.num_classes).to(device)
    with TemporaryDirectory() as folder:
        config = train.TrainConfig(epochs=1, folder=str(Path(folder, "run")), tensorboard=False)
        timing.wait(device)
        start = time.perf_counter()
        batches = ResidentLoader(images, BATCH, train=True, device=device)
        timing.wait(device)
        laid_out = time.perf_counter() - start
        return laid_out + train.fit(cohort, batches, None, config).seconds


CONTENDERS: dict[str, Callable[[ImageSet, torch.device], float]] = {
    "fastdml.train": _our_epoch,
    "usual loop": _usual_epoch,
}


@lru_cache(maxsize=1)
def measure(root: str, count: int, device: torch.device) -> tuple[dict[str, list[float]], str]:
    """Seconds an epoch of each contender, taking turns, after one that is not counted."""
    images, data = _images(root, count)
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(ROUNDS + 1):
        for name, epoch in CONTENDERS.items():
            few = images.subset(2 * BATCH) if turn == 0 else images
            samples[name].append(epoch(few, device))
    return {name: each[1:] for name, each in samples.items()}, data


def pytest_generate_tests(metafunc):
    device = chosen_device(metafunc.config)
    metafunc.parametrize("name", CONTENDERS, ids=[f"{device.type}-{n}" for n in CONTENDERS])


def test_epoch(name, device, record, request):
    full = request.config.getoption("--full")
    count = (FULL_IMAGES if full else IMAGES)[device.type]
    try:
        samples, data = measure(request.config.getoption("--data"), count, device)
    except MissingExtra as missing:
        pytest.skip(str(missing))
    record(
        samples[name],
        f"epoch {device.type}",
        bench="end_to_end",
        name=name,
        device=device.type,
        peers=" + ".join(PEERS),
        images=count,
        data=data,
    )
