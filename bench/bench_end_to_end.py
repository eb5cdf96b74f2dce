"""One epoch of training, from stored images to updated weights.

Ours is `fastdml.train.fit` as a user calls it, with its loader set up, its execution chosen, its
log, its checkpoint and its weights written; its rate after the first steps is what a long run has.
The usual loop is a DataLoader of per-image transforms in two workers feeding the pairwise loop. On
CIFAR-100 where its folder is there (--data), otherwise on random images, which the table says. On
CUDA a page of profile of our steps follows. Quick set: two ResNet-32 and 640 images on a CPU (half
a minute), 6,400 on CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from bench import sets, timing
from bench.baselines import data_loader
from bench.conftest import chosen_device
from bench.failures import once
from fastdml import Cohort, train
from fastdml.data import ImageSet, ResidentLoader
from fastdml.engine.profile import PAGE
from fastdml.errors import MissingExtra
from fastdml.machine import pairwise

PEERS = ("resnet32", "resnet32")
BATCH = 64
ROUNDS = 3
IMAGES = {"cpu": 640, "cuda": 6_400}
FULL_IMAGES = {"cpu": 10_000, "cuda": 50_000}


class Size(NamedTuple):
    peers: tuple[str, ...]
    batch: int
    images: int
    rounds: int
    profile: bool


SMALLEST = Size(("resnet8", "resnet8"), 4, 16, 1, True)  # a dry run's


def _size(wanted: str, full: bool) -> Size:
    """What is measured on this kind of device."""
    on_cuda = wanted == "cuda"
    images = (FULL_IMAGES if full else IMAGES)[wanted]
    return Size(PEERS, BATCH, images, 1 if on_cuda and not full else ROUNDS, on_cuda)


def _usual_epoch(images: ImageSet, size: Size, device: torch.device) -> tuple[float, None]:
    """Seconds, workers' start included."""
    cohort = Cohort(size.peers, images.num_classes).to(device).train()
    loop = pairwise.Loop(
        cohort.peers,
        lambda w: torch.optim.SGD(w, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    )
    batches = data_loader.loader(images, size.batch, device)
    timing.wait(device)
    start = time.perf_counter()
    for x, y in batches:
        loop(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
    timing.wait(device)
    return time.perf_counter() - start, None


def _our_epoch(images: ImageSet, size: Size, device: torch.device) -> tuple[float, float]:
    """Seconds: the loader's layout of the images, the epoch, and all that a run writes in it; and
    images a second after the first steps."""
    return _our_run(images, size, device)[:2]


def _our_run(
    images: ImageSet, size: Size, device: torch.device, **options
) -> tuple[float, float, str]:
    """As `_our_epoch`, and the page that a profiled run writes."""
    cohort = Cohort(size.peers, images.num_classes).to(device)
    with TemporaryDirectory() as folder:
        run = Path(folder, "run")
        config = train.TrainConfig(epochs=1, folder=str(run), tensorboard=False, **options)
        timing.wait(device)
        start = time.perf_counter()
        batches = ResidentLoader(images, size.batch, train=True, device=device)
        timing.wait(device)
        laid_out = time.perf_counter() - start
        result = train.fit(cohort, batches, None, config)
        page = (run / PAGE).read_text() if config.profile else ""
    return laid_out + result.seconds, result.images_per_second, page


CONTENDERS: dict[str, Callable[[ImageSet, Size, torch.device], tuple[float, float | None]]] = {
    "fastdml.train": _our_epoch,
    "usual loop": _usual_epoch,
}


class Measured(NamedTuple):
    samples: dict[str, list[float]]  # seconds an epoch
    data: str  # what the images are
    steady: float  # images a second of ours after the first steps
    profile: str  # a page about our steps, on CUDA


@once(MissingExtra)
def measure(root: str, size: Size, device: torch.device) -> Measured:
    """All contenders, taking turns, after a turn that is not counted."""
    images, data = sets.cifar100(root, size.images)
    steady = 0.0
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(1 + size.rounds):
        for name, epoch in CONTENDERS.items():
            few = images.subset(2 * size.batch) if turn == 0 else images
            seconds, rate = epoch(few, size, device)
            samples[name].append(seconds)
            steady = rate or steady
    page = _our_run(images, size, device, profile=True)[2] if size.profile else ""
    return Measured({name: each[1:] for name, each in samples.items()}, data, steady, page)


def pytest_generate_tests(metafunc):
    device = chosen_device(metafunc.config)
    metafunc.parametrize("name", CONTENDERS, ids=[f"{device.type}-{n}" for n in CONTENDERS])


def test_epoch(name, device, dry, record, request):
    option, wanted = request.config.getoption, chosen_device(request.config).type
    size = _size(wanted, option("--full"))
    measured = measure(option("--data"), SMALLEST if dry else size, device)
    ours = name == "fastdml.train"
    record(
        measured.samples[name],
        f"epoch {wanted}",
        bench="end_to_end",
        name=name,
        device=wanted,
        peers=" + ".join(PEERS),
        images=size.images,
        data=measured.data,
        steady=measured.steady if ours else None,
        profile=measured.profile if ours else "",
    )
