"""Images a second of each loader against what people write today.

CIFAR-100: pad, crop, flip, normalise, batch 64. Market-1501 (its stand-in, made of CIFAR-100, in
the same layout and size of file): decode, resize to 256x128, pad, crop, flip, erase, normalise.
Rivals: the usual DataLoader with transforms one by one (plain, and torchvision's where it is
installed), and for CIFAR batched torch as in airbench. Loaders with worker processes are timed
after their workers have started. Ours are compared with each other before they are timed. Random
images take the place of CIFAR-100 where it is absent (--data). On CUDA also the augmentation
kernel by itself, in bf16: its time on the device against its byte budget. Quick set on two CPU
cores: about two minutes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain, count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdml_kernels.augment_options import Augment, bytes_moved

from bench import sets, timing
from bench.baselines import airbench, data_loader
from bench.conftest import chosen_device
from bench.failures import once
from fastdml.data import (
    DALILoader,
    ImageSet,
    Market1501,
    ReidSplit,
    ResidentLoader,
    TorchLoader,
)
from fastdml.data.loaders.make import has_dali
from fastdml.data.sets.stand_in import StandIn, build_standin
from fastdml.errors import InputError

SECONDS = {"cpu": 15.0, "cuda": 3.0}  # of timing a set, all contenders together
BATCH = 64
AHEAD = 4  # batches that two workers have ready
MARKET = {"size": (256, 128), "pad": 10, "padding": "black", "erase": 0.5}
NAMES = ("resident", "dali", "torch", "usual", "torchvision", "airbench")
TOLERANCE = 1e-5
KERNEL_SECONDS = 1.0
SETS = {"cifar": 50_000, "market": 12_936}  # images in memory
STANDIN = StandIn(train_images=100)  # 5,000 to train on: an epoch, whose start costs, is long
# In a dry run: images of CIFAR-100 and their batch, and a stand-in.
SMALLEST = 1_200, 4, StandIn(train_ids=2, test_ids=1, images=12, junk=0, distractors=0)

Sets = tuple[ImageSet, "ReidSplit | None"]  # what is in memory, and its files


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize(("data", "name"), list(product(("cifar100", "market1501"), NAMES)))


def _endless(loader: Any) -> Iterator:
    """Batches of epoch after epoch, from one of ours or from a DataLoader."""
    if hasattr(loader, "epoch"):
        return chain.from_iterable(loader.epoch(e) for e in count())
    return chain.from_iterable(iter(loader) for _ in count())


def _contenders(sets: Sets, batch: int, device: torch.device) -> dict[str, Callable[[], Iterator]]:
    """name -> a function that starts it."""
    images, files = sets
    options = {"train": True, "device": device, **(MARKET if files else {})}
    streamed = files or images
    ours = {
        "resident": lambda: ResidentLoader(images, batch, **options),
        "torch": lambda: TorchLoader(streamed, batch, **options),
    }
    if has_dali():
        ours["dali"] = lambda: DALILoader(streamed, batch, **options)
    _check({name: make() for name, make in ours.items()})
    all_ = {name: lambda make=make: _endless(make()) for name, make in ours.items()}

    def moved(loader: Any) -> Iterator:
        for x, y in _endless(loader):
            yield x.to(device, memory_format=torch.channels_last), y.to(device)

    if not files:
        all_["usual"] = lambda: moved(data_loader.loader(images, batch, device))
        all_["airbench"] = lambda: airbench.batches(images, batch, device)
    if find_spec("torchvision") is not None:
        from bench.baselines import vision

        all_["torchvision"] = lambda: moved(vision.loader(streamed, batch, device))
    return all_


def _check(ours: dict[str, Any]) -> None:
    """Raises AssertionError where our loaders' first batches differ."""
    found = {name: next(iter(loader.epoch(0))) for name, loader in ours.items()}
    images, labels = found["resident"]
    for name, (x, y) in found.items():
        assert torch.equal(y, labels), f"{name}: other labels"
        assert (x - images).abs().max() <= TOLERANCE, f"{name}: other pixels"


@once(InputError)
def measure(
    data: str, root: str, folder: Path, device: torch.device, dry: bool = False
) -> tuple[dict[str, list[float]], str]:
    """Seconds a batch of every contender, interleaved; and what the images are."""
    number, batch, standin = SMALLEST if dry else (50_000, BATCH, STANDIN)
    images, what = sets.cifar100(root, number)
    given: Sets = images, None
    if data == "market1501":
        build_standin(folder, images, standin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a subset
            files = Market1501(folder, progress=False, cache=folder / "scans").train
        given = files.decode(), files
    timers = {}
    for name, start in _contenders(given, batch, device).items():
        batches = start()
        next(batches)
        timer = timing.wall(lambda batches=batches: next(batches), device)
        timers[name] = timer if name in ("resident", "airbench") else _sustained(timer)
    return timing.interleave(timers, SECONDS[device.type], fewest=3, most=30), what


def _sustained(timer: timing.Timer) -> timing.Timer:
    """The timer of a loader that makes batches ahead: first takes the batches that were made while
    others were timed."""

    def sustained(calls: int) -> float:
        timer(AHEAD)
        return timer(AHEAD + calls) * calls / (AHEAD + calls)

    return sustained


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("market")


def test_data(data, name, folder, device, dry, record, request):
    wanted = chosen_device(request.config).type
    samples, what = measure(data, request.config.getoption("--data"), folder, device, dry)
    if name not in samples:
        pytest.skip(f"{name} is not installed, or has no such pipeline")
    record(
        samples[name],
        f"data {data} {wanted}",
        bench="data",
        data=data if what == "CIFAR-100" else f"{data} ({what})",
        device=wanted,
        batch=BATCH,
        name=name,
    )


def kernel_calls(
    stored: tuple[int, int, int], what: Augment, batch: int, n: int, device: torch.device
) -> list[Callable[[], Any]]:
    """Launches that each augment a batch of their own out of `n` random images (H, W, ch)."""
    from fastdml_kernels.augment import augment

    H, W, ch = stored
    images = torch.randint(256, (n, H, W, ch), dtype=torch.uint8, device=device)
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    mean, scale = torch.full((ch,), 128.0, device=device), torch.full((ch,), 1 / 64, device=device)
    epoch = torch.zeros(1, dtype=torch.int64, device=device)

    def call(samples: torch.Tensor) -> Any:
        return augment(
            images, labels, samples, mean, scale, what, seed=0, epoch=epoch, dtype=torch.bfloat16
        )

    chosen = [torch.randint(n, (batch,), device=device) for _ in range(timing.CALLS_A_GRAPH)]
    return [lambda samples=samples: call(samples) for samples in chosen]


@pytest.mark.parametrize("batch", [64, 512, 16_384])  # the last beyond any L2 cache
@pytest.mark.parametrize("data", list(SETS))
def test_kernel(data, batch, device, dry, copy_bandwidth, record, request):
    if chosen_device(request.config).type != "cuda":
        pytest.skip("the kernel needs a CUDA device")
    from fastdml_kernels.static_report import AUGMENTED

    stored, what = AUGMENTED[data]
    if dry:
        resized = stored[:2] != (what.height, what.width)
        small = replace(what, height=8, width=4, pad=1)
        calls = kernel_calls((4 if resized else 8, 4, 3), small, 2, 9, device)
    else:
        calls = kernel_calls(stored, what, batch, SETS[data], device)
    pool = None if dry else torch.cuda.graph_pool_handle()
    timer = timing.device_time(calls, pool, device)
    record(
        timing.interleave({"kernel": timer}, KERNEL_SECONDS)["kernel"],
        f"augment {data}",
        bench="augment",
        data=data,
        batch=batch,
        name="kernel",
        least_bytes=batch * bytes_moved(stored, what, torch.bfloat16.itemsize),
        copy_bandwidth=copy_bandwidth,
    )
