"""Re-identification: scores, re-ranking and metric losses against the usual code, and the trainer.

Scores at the size of Market-1501, 3,368 queries against 15,913 gallery images, with distances given
or from features, and with 500,000 distractors; re-ranking; a loss on features with its gradient;
images a second of a training run with the strong recipe's losses on the stand-in of Market-1501,
made of random images where CIFAR-100 is absent (--data). torchreid's Cython evaluator takes part
where a package has it compiled; `baselines/reid_cython.py` says which.
Results are compared before they are timed. Memory is the peak of a fresh process that makes its
inputs and does this alone.

In the quick set slow rivals score the first queries only, and their time is scaled to all of them;
the table says so. It takes about three minutes on two CPU cores; --full an hour, mostly theirs.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import sets, timing
from bench.baselines import (
    reid_argsort,
    reid_cython,
    reid_dense_rerank,
    reid_loop,
    reid_losses,
    reid_torchreid,
)
from bench.conftest import chosen_device
from bench.failures import once
from fastdml import Cohort, metrics, train
from fastdml.data import Market1501
from fastdml.data.sets.stand_in import StandIn, build_standin
from fastdml.errors import InputError
from fastdml.models import ReidHead
from fastdml.train.config.sources import preset
from fastdml.train.tasks.reid import prepare

SECONDS = 6.0  # of timing a case, all contenders together
PEOPLE = 750
BLOCK = 64  # queries at once where a rival cannot hold the whole matrix


class Case(NamedTuple):
    kind: str  # "scores" or "rerank"
    data: str
    queries: int
    gallery: int
    dims: int  # 0: distances are given

    def smallest(self) -> Case:
        """For a dry run."""
        return self._replace(queries=70, gallery=200, dims=min(self.dims, 16))

    def __str__(self) -> str:
        return f"{self.kind}-{self.data}-{self.queries}x{self.gallery}x{self.dims}"


SCORES = [
    Case("scores", "distances", 3_368, 15_913, 0),
    Case("scores", "features", 3_368, 15_913, 2_048),
    Case("scores", "distractors", 3_368, 515_913, 128),
]
RERANK = {False: Case("rerank", "features", 300, 1_500, 512),
          True: Case("rerank", "features", 3_368, 15_913, 2_048)}  # fmt: skip
# How many queries each contender scores in the quick set; in the full one all of them, save where
# its matrices or hours do not fit: with distractors.
ALL = 10**9
FIRST = {
    "distances": {"torchreid cython": ALL, "argsort": 500, "numpy loop": 200, "torchreid": 100},
    "features": {"torchreid cython": ALL, "argsort": 500, "torchreid": 100},
    "distractors": {"argsort": BLOCK},
}


class Inputs(NamedTuple):
    query: Tensor | None
    gallery: Tensor | None
    distances: Tensor | None
    query_ids: Tensor
    gallery_ids: Tensor
    query_cameras: Tensor
    gallery_cameras: Tensor

    @property
    def labels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[3:]

    def first(self, n: int) -> Inputs:
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:n]

        return self._replace(
            query=cut(self.query),
            distances=cut(self.distances),
            query_ids=self.query_ids[:n],
            query_cameras=self.query_cameras[:n],
        )


def inputs(case: Case, device: torch.device) -> Inputs:
    """People seen by six cameras, about 15 matches a query; who is beyond them is a distractor."""
    generator = torch.Generator().manual_seed(0)
    known = min(case.gallery, 15_913)

    def draw(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    labels = [
        draw(1, PEOPLE + 1, case.queries),
        torch.cat([draw(0, PEOPLE + 1, known), torch.zeros(case.gallery - known).long()]),
        draw(1, 7, case.queries),
        draw(1, 7, case.gallery),
    ]
    query = gallery = distances = None
    if case.dims:
        who = torch.randn(PEOPLE + 1, case.dims, generator=generator)
        query = torch.randn(case.queries, case.dims, generator=generator)
        gallery = torch.randn(case.gallery, case.dims, generator=generator)
        query = F.normalize(query.add_(who[labels[0]], alpha=0.5))
        gallery = F.normalize(gallery.add_(who[labels[1]], alpha=0.5))
    else:
        distances = torch.rand(case.queries, case.gallery, generator=generator)
    moved = [None if x is None else x.to(device) for x in (query, gallery, distances)]
    return Inputs(*moved, *(x.to(device) for x in labels))


def _ours(x: Inputs) -> tuple[float, float]:
    scores = metrics.reid_scores(x.query, x.gallery, *x.labels, distances=x.distances)
    return scores.mAP, scores.rank(1)


def _rival(scores: Callable, x: Inputs) -> tuple[float, float]:
    """A rival on distances, or on those of features, which are of unit length."""
    if x.distances is None:
        x = x._replace(distances=1 - x.query @ x.gallery.T)
    arguments = (x.distances, *x.labels)
    if scores is not reid_argsort.scores:
        arguments = tuple(a.cpu().numpy() for a in arguments)
    return scores(*arguments)


CONTENDERS: dict[str, Callable[[Inputs], Any]] = {
    "ours": _ours,
    "argsort": partial(_rival, reid_argsort.scores),
    "numpy loop": partial(_rival, reid_loop.scores),
    "torchreid": partial(_rival, reid_torchreid.scores),
    "torchreid cython": partial(_rival, reid_cython.scores),
}


def _rerank_ours(x: Inputs) -> Tensor:
    return metrics.k_reciprocal_rerank(x.query, x.gallery)


def _rerank_dense(x: Inputs) -> Tensor:
    return torch.from_numpy(reid_dense_rerank.rerank(x.query.cpu(), x.gallery.cpu()))


RERANKERS = {"ours": _rerank_ours, "dense": _rerank_dense}


def _measured(case: Case, name: str, full: bool) -> int:
    """How many queries the contender scores."""
    if case.kind == "rerank" or (full and case.data != "distractors"):
        return case.queries
    return min(FIRST[case.data].get(name, ALL), case.queries)


def _peak(case: Case, name: str, threads: int, pipe: Any) -> None:
    """Runs in a process of its own: sends its peak memory in bytes."""
    torch.set_num_threads(threads)
    x = inputs(case, torch.device("cpu"))
    (RERANKERS if case.kind == "rerank" else CONTENDERS)[name](x)
    # not getrusage's: that begins with what the parent had
    facts = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    pipe.send(1024 * int(facts["VmHWM"].split()[0]))


def peak_memory(case: Case, name: str) -> int:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(case, name, torch.get_num_threads(), theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


class Measured(NamedTuple):
    samples: dict[str, list[float]]
    queries: dict[str, int]  # that were scored


@once()
def measure(case: Case, full: bool, device: torch.device) -> Measured:
    """Seconds for all queries of every contender, interleaved."""
    x = inputs(case, device)
    if case.kind == "rerank":
        _check_rerank(device)
        timers = {n: timing.wall(partial(f, x), device) for n, f in RERANKERS.items()}
        return Measured(timing.interleave(timers, SECONDS, fewest=1), {})
    names = {n: _measured(case, n, full) for n in ("ours", *FIRST[case.data])}
    if reid_cython.evaluator() is None:
        names.pop("torchreid cython", None)
    _check_scores(x.first(64), names)
    timers = {
        n: timing.wall(partial(CONTENDERS[n], x.first(count)), device) for n, count in names.items()
    }
    samples = timing.interleave(timers, SECONDS, fewest=1, most=20)
    scaled = {n: [s * case.queries / names[n] for s in each] for n, each in samples.items()}
    return Measured(scaled, names)


def _check_scores(x: Inputs, names: dict[str, int]) -> None:
    """Raises AssertionError where contenders differ, by more than equal distances may make it."""
    ours = _ours(x)
    for name in names:
        found = CONTENDERS[name](x)
        assert found == pytest.approx(ours, abs=1e-4), f"{name}: {found}, ours: {ours}"


def _check_rerank(device: torch.device) -> None:
    x = inputs(Case("rerank", "features", 50, 250, 64), device)
    assert torch.allclose(_rerank_ours(x).cpu(), _rerank_dense(x), rtol=0, atol=1e-5)


# --- losses on features --------------------------------------------------------------------------

LOSSES = ("triplet", "circle", "center")
LOSS_SIZES = {False: [(64, 2_048)], True: [(64, 512), (64, 2_048), (256, 2_048)]}
LOSS_NAMES = ("ours", "pml", "usual")
IMAGES_PER_ID = 4


def loss_functions(loss: str, N: int, D: int, device: torch.device) -> dict[str, Callable]:
    """name -> a function of (features, labels) giving the loss, 0-d, with the usual settings."""
    from fastdml.metric_losses import CenterLoss, circle_loss, triplet_loss

    found: dict[str, Callable] = {}
    if loss == "triplet":
        found = {"ours": triplet_loss, "usual": reid_losses.triplet}
    elif loss == "circle":
        found = {"ours": circle_loss}
    else:
        ours = CenterLoss(PEOPLE, D).to(device).eval()  # its centres stay: the same loss each time
        found = {"ours": ours, "usual": lambda x, y: reid_losses.center(x, y, ours.centers)}
    if find_spec("pytorch_metric_learning") and loss != "center":  # which it does not have
        from pytorch_metric_learning import distances, losses, miners, reducers

        if loss == "circle":
            found["pml"] = losses.CircleLoss(m=0.25, gamma=128, reducer=reducers.MeanReducer())
        else:
            euclidean = distances.LpDistance(normalize_embeddings=False)
            mine = miners.BatchHardMiner(distance=euclidean)
            hard = losses.TripletMarginLoss(
                margin=0.3, distance=euclidean, reducer=reducers.MeanReducer()
            )
            found["pml"] = lambda x, y: hard(x, y, mine(x, y))
    return found


@once()
def measure_loss(loss: str, N: int, D: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of the loss and its gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N // IMAGES_PER_ID).repeat_interleave(IMAGES_PER_ID).to(device)
    features = torch.randn(N, D, generator=generator).to(device).requires_grad_()
    functions = loss_functions(loss, N, D, device)

    def call(function: Callable) -> tuple[Tensor, Tensor]:
        value = function(features, labels)
        return value.detach(), torch.autograd.grad(value, features)[0]

    value, gradient = call(functions["ours"])
    for name, function in functions.items():
        other, other_gradient = call(function)
        assert torch.allclose(other, value, rtol=1e-4), f"{name}: {other}, ours: {value}"
        error = (other_gradient - gradient).norm() / gradient.norm()
        assert error < 1e-3, f"{name}: its gradient differs by {error:.1e} of ours"
    timers = {n: timing.wall(partial(call, f), device) for n, f in functions.items()}
    return timing.interleave(timers, SECONDS / 3)


# --- training ------------------------------------------------------------------------------------

PEERS = ("resnet20", "resnet20")
TRAINERS = ("fastdml.train", "usual loop")


class Size(NamedTuple):
    peers: tuple[str, ...]
    height: int
    width: int
    subset: int  # of the training images are used; 0: all 1,200
    batch: int
    rounds: int
    standin: StandIn


TRAINING = {
    False: Size(PEERS, 64, 32, 320, 64, 1, StandIn()),
    True: Size(PEERS, 128, 64, 0, 64, 3, StandIn()),
}
SMALLEST = Size(("resnet8", "resnet8"), 16, 8, 0, 8, 1, StandIn(2, 1, 12, 0, 0, 0))  # a dry run's


def _our_epoch(market: Market1501, config: train.ReidConfig, device: torch.device) -> float:
    """Seconds an image: decoding, the epoch, and all that a run writes in it."""
    with TemporaryDirectory() as folder:
        config = config.replace(folder=str(Path(folder, "run")))
        timing.wait(device)
        start = time.perf_counter()
        cohort, batches, *_ = prepare(market, config, device)
        timing.wait(device)
        prepared = time.perf_counter() - start
        seconds = prepared + train.fit(cohort, batches, None, config).seconds
    return seconds / (len(batches) * config.batch_size)


def _usual_epoch(market: Market1501, config: train.ReidConfig, device: torch.device) -> float:
    """Seconds an image, workers' start included."""
    from bench.baselines import reid_training

    split = market.train.subset(config.subset, config.seed) if config.subset else market.train
    timing.wait(device)
    start, images = time.perf_counter(), 0
    cohort = Cohort(config.peers, split.num_classes, head=ReidHead()).to(device).train()
    loop = reid_training.Loop(cohort.peers)
    for x, y in reid_training.loader(split, config.size, config.batch_size, config.images_per_id):
        loop(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
        images += len(x)
    timing.wait(device)
    return (time.perf_counter() - start) / images


@once(InputError)
def measure_training(
    root: str, folder: Path, size: Size, device: torch.device
) -> tuple[dict[str, list[float]], train.ReidConfig, str]:
    """Seconds an image of each trainer, taking turns; the settings; and what the images are."""
    images, what = sets.cifar100(root, 100 * max(size.standin.images, size.standin.distractors))
    build_standin(folder, images, size.standin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a subset
        market = Market1501(folder, progress=False, cache=folder / "scans")
    config = preset("market1501", standin=True, recipe="strong").replace(
        peers=size.peers, height=size.height, width=size.width, subset=size.subset,
        batch_size=size.batch, epochs=1, warmup_epochs=0.0, tensorboard=False, progress=False,
    )  # fmt: skip
    samples: dict[str, list[float]] = {}
    for _ in range(size.rounds):
        for name, epoch in zip(TRAINERS, (_our_epoch, _usual_epoch), strict=True):
            if name != "usual loop" or find_spec("torchvision"):
                samples.setdefault(name, []).append(epoch(market, config, device))
    return samples, config, what


# --- pytest --------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    if "case" in metafunc.fixturenames:
        values = [(case, n) for case in SCORES for n in ("ours", *FIRST[case.data])]
        values += [(RERANK[full], name) for name in RERANKERS]
        ids = [f"{case}-{name}".replace(" ", "_") for case, name in values]
        metafunc.parametrize(("case", "name"), values, ids=ids)
    elif "loss" in metafunc.fixturenames:
        values = [
            (loss, *size, name)
            for size in LOSS_SIZES[full]
            for loss in LOSSES
            for name in LOSS_NAMES
        ]
        metafunc.parametrize(("loss", "N", "D", "name"), values)
    else:
        metafunc.parametrize("trainer", TRAINERS)


def test_retrieval(case, name, device, dry, record, request):
    full = request.config.getoption("--full")
    wanted = chosen_device(request.config).type
    measured = measure(case.smallest() if dry else case, full, device)
    if name not in measured.samples:
        pytest.skip("no package with torchreid's compiled rank_cy is installed: see reid_cython")
    scored = measured.queries.get(name, case.queries)
    whole = wanted == "cpu" and scored == case.queries and sys.platform == "linux"
    record(
        measured.samples[name],
        str(case),
        bench="reid",
        kind=case.kind,
        data=case.data,
        queries=case.queries,
        gallery=case.gallery,
        dims=case.dims,
        device=wanted,
        name=name,
        scored=scored,
        peak_bytes=peak_memory(case, name) if whole else None,
    )


def test_loss(loss, N, D, name, device, dry, record, request):
    samples = measure_loss(loss, *((8, 16) if dry else (N, D)), device)
    if name not in samples:
        pytest.skip(f"{name} is not installed, or has no such loss")
    record(
        samples[name],
        f"metric loss {loss}",
        bench="reid_loss",
        loss=loss,
        N=N,
        D=D,
        device=chosen_device(request.config).type,
        name=name,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("market")


def test_training(trainer, folder, device, dry, record, request):
    option, wanted = request.config.getoption, chosen_device(request.config).type
    size = SMALLEST if dry else TRAINING[option("--full")]
    measured = measure_training(option("--data"), folder, size, device)
    samples, config, what = measured
    if trainer not in samples:
        pytest.skip("torchvision is not installed")
    record(
        samples[trainer],
        f"re-identification training {wanted}",
        bench="reid_training",
        data=what,
        peers=" + ".join(PEERS),
        size=f"{config.height}x{config.width}",
        batch=config.batch_size,
        device=wanted,
        name=trainer,
    )
