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
from bench.baselines import data_loader, pairwise
from bench.conftest import chosen_device
from bench.failures import once
from fastdml import Cohort, train
from fastdml.data import ImageSet, ResidentLoader
from fastdml.engine.profile import PAGE
from fastdml.errors import MissingExtra

PEERS = ("resnet32", "resnet32")
BATCH = 64
ROUNDS = 3
IMAGES = {"cpu": 640, "cuda": 6_400}
FULL_IMAGES = {"cpu": 10_000, "cuda": 50_000}


def _usual_epoch(images: ImageSet, device: torch.device) -> tuple[float, None]:
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
    return time.perf_counter() - start, None


def _our_epoch(images: ImageSet, device: torch.device) -> tuple[float, float]:
    """Seconds: the loader's layout of the images, the epoch, and all that a run writes in it; and
    images a second after the first steps."""
    return _our_run(images, device)[:2]


def _our_run(images: ImageSet, device: torch.device, **options) -> tuple[float, float, str]:
    """As `_our_epoch`, and the page that a profiled run writes."""
    cohort = Cohort(PEERS, images.num_classes).to(device)
    with TemporaryDirectory() as folder:
        run = Path(folder, "run")
        config = train.TrainConfig(epochs=1, folder=str(run), tensorboard=False, **options)
        timing.wait(device)
        start = time.perf_counter()
        batches = ResidentLoader(images, BATCH, train=True, device=device)
        timing.wait(device)
        laid_out = time.perf_counter() - start
        result = train.fit(cohort, batches, None, config)
        page = (run / PAGE).read_text() if config.profile else ""
    return laid_out + result.seconds, result.images_per_second, page


CONTENDERS: dict[str, Callable[[ImageSet, torch.device], tuple[float, float | None]]] = {
    "fastdml.train": _our_epoch,
    "usual loop": _usual_epoch,
}


class Measured(NamedTuple):
    samples: dict[str, list[float]]  # seconds an epoch
    data: str  # what the images are
    steady: float  # images a second of ours after the first steps
    profile: str  # a page about our steps, on CUDA


@once(MissingExtra)
def measure(root: str, full: bool, device: torch.device) -> Measured:
    """All contenders, taking turns, after a turn that is not counted."""
    count = (FULL_IMAGES if full else IMAGES)[device.type]
    images, data = sets.cifar100(root, count)
    steady = 0.0
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(1 + (1 if device.type == "cuda" and not full else ROUNDS)):
        for name, epoch in CONTENDERS.items():
            few = images.subset(2 * BATCH) if turn == 0 else images
            seconds, rate = epoch(few, device)
            samples[name].append(seconds)
            steady = rate or steady
    page = _our_run(images, device, profile=True)[2] if device.type == "cuda" else ""
    return Measured({name: each[1:] for name, each in samples.items()}, data, steady, page)


def pytest_generate_tests(metafunc):
    device = chosen_device(metafunc.config)
    metafunc.parametrize("name", CONTENDERS, ids=[f"{device.type}-{n}" for n in CONTENDERS])


def test_epoch(name, device, record, request):
    option = request.config.getoption
    measured = measure(option("--data"), option("--full"), device)
    full = FULL_IMAGES if option("--full") else IMAGES
    ours = name == "fastdml.train"
    record(
        measured.samples[name],
        f"epoch {device.type}",
        bench="end_to_end",
        name=name,
        device=device.type,
        peers=" + ".join(PEERS),
        images=full[device.type],
        data=measured.data,
        steady=measured.steady if ours else None,
        profile=measured.profile if ours else "",
    )
