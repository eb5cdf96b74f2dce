"""What a reproduction costs, said before anything is trained: time, disk, memory, hours and money.

Time is that of another seed of the same training, where one has ended; else steps of the same peers
on random images, on the device, and forward passes for the evaluations, are timed. Files are
counted from the tensors that they hold. Trainings that have ended cost nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.data import record
from fastdml.devices import choose_device, device_name
from fastdml.engine import make_step
from fastdml.engine.amp import resolve_amp
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.files import replacing, writing
from fastdml.models import ReidHead
from fastdml.report.metrics_log import INDEPENDENT, read_metrics
from fastdml.report.predictions import PICTURES
from fastdml.report.summary import read_summary
from fastdml.reproduce.scales import IMAGES
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.reid import ReidConfig
from fastdml.train.learning_rate import total_steps
from fastdml.train.optimizer import optimizer_of
from fastdml.train.tasks.task import task_of
from fastdml.units import duration, size

logger = logging.getLogger(__name__)

COSTS = "costs.json"  # beside the trainings' folders: what was measured, for the next start
STEPS = 3  # timed, after one that is not; one where it takes longer than
LONG = 5.0  # seconds
STAND_IN = (10_000, 1060)  # as `IMAGES`, of the stand-in for Market-1501
IDENTITIES = {True: 50, False: 751}  # of the stand-in, and of Market-1501
# Bytes, as found in folders of runs: of an archive beside its tensors, of each tensor in it, and of
# what a peer says of a test image once it is compressed.
ARCHIVE, OF_TENSOR, OF_PREDICTION = 4096, 400, 8.0
OF_NUMBER = 20  # of metrics.jsonl
SETTINGS = 12_000  # config.yaml, summary.json and cohort.json
FIGURES = 200_000  # curves and pairwise_kl in one format
EVENTS = 60  # of TensorBoard, a number


class Run(NamedTuple):
    """A run of a reproduction."""

    name: str  # of its training
    config: TrainConfig
    ended: bool
    teachers: tuple[str, ...] = ()  # models of those that teach


@dataclass(frozen=True)
class Measured:
    """What was measured of the peers of a run."""

    step: float  # seconds
    image: float  # of an evaluation, seconds
    weights: int  # bytes of all peers
    state: int  # of the optimizer
    tensors: int  # how many tensors the peers have
    memory: int | None  # of a step on a CUDA device, at its peak


Measure = Callable[[Run, torch.device], Measured]


@dataclass(frozen=True)
class Cost:
    """Of one run that has not ended."""

    name: str
    seconds: float
    files: int  # bytes, when it has ended
    spare: int  # bytes more while a checkpoint is written
    memory: int | None
    timed: str  # how the time was found


@dataclass(frozen=True)
class Estimate:
    """The cost of all runs that have not ended; its text is what the user sees."""

    costs: tuple[Cost, ...]
    unknown: Mapping[str, str]  # by training, why its cost is not known
    ended: int  # runs
    folder: Path
    free: int  # bytes on its disk
    device: str
    device_memory: int | None = None  # bytes free
    price_per_hour: float | None = None

    @property
    def seconds(self) -> float:
        """Of all, one after the other."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def disk(self) -> int:
        """Bytes when all have ended."""
        return sum(cost.files for cost in self.costs)

    @property
    def memory(self) -> int | None:
        """Of the largest."""
        return max((cost.memory for cost in self.costs if cost.memory is not None), default=None)

    def __str__(self) -> str:
        if not self.costs and not self.unknown:
            return f"{_runs(self.ended)} ended: nothing is left to train"
        longest: dict[str, list[Cost]] = {}
        for cost in self.costs:
            longest.setdefault(cost.name, []).append(cost)
        left = len(self.costs) + len(self.unknown)
        lines = [f"{left} to train on {self.device}, {_runs(self.ended)} ended"]
        lines.append(f"time    about {duration(self.seconds)}, one after the other")
        for name, costs in longest.items():
            each = duration(sum(cost.seconds for cost in costs))
            how = costs[0].timed
            several = f"{len(costs)} runs, " if len(costs) > 1 else ""
            lines.append(f"        {name}: {each} ({several}{how})")
        lines += [f"        {name}: not known ({why})" for name, why in self.unknown.items()]
        lines.append(f"disk    {size(self.disk)} of {size(self.free)} free, in {self.folder}")
        if self.memory is not None and self.device_memory is not None:
            free = size(self.device_memory)
            lines.append(f"memory  {size(self.memory)} of {free} free on the device")
        hours = self.seconds / 3600
        if self.price_per_hour is not None:
            price = self.price_per_hour
            lines.append(f"cost    {hours:.2f} hours at {price:g}: {hours * price:,.2f}")
        return "\n".join(lines)

    def check_room(self) -> None:
        """Raises InputError where the disk, or the device's memory, has no room."""
        needed = self.disk + max((cost.spare for cost in self.costs), default=0)
        if needed > self.free:
            raise InputError(
                f"{self.folder}: {size(needed)} are needed and {size(self.free)} are free: make "
                "room, or choose another disk with --folder"
            )
        memory, free = self.memory, self.device_memory
        if memory is not None and free is not None and memory > free:
            raise InputError(
                f"the largest run needs {size(memory)} of the device's memory, of which "
                f"{size(free)} are free: free some, or choose another device with --device"
            )


def estimate(
    runs: Sequence[Run],
    folder: Path,
    device: str = "auto",
    *,
    price_per_hour: float | None = None,
    keep: bool = False,
    measure: Measure | None = None,
) -> Estimate:
    """Runs of one name and of as many peers cost the same. folder: of the trainings, in which what
    was measured is looked for and, with `keep`, kept. measure: in place of `measured`."""
    chosen = choose_device(device)
    past: dict[Any, float] = {}
    for run in runs:
        if run.ended and (seconds := _took(run.config)):
            past[run.name, len(run.config.peers)] = seconds
    costs: list[Cost] = []
    unknown: dict[str, str] = {}
    with _kept(folder, device_name(chosen), keep) as known:
        for run in runs:
            if run.ended:
                continue
            key = f"{run.name} {len(run.config.peers)}"
            if key not in known:
                logger.info(f"timing a few steps of {run.name}")
                try:
                    known[key] = (measure or measured)(run, chosen)
                except Exception as error:  # as training it may, and others go on
                    unknown[run.name] = " ".join(str(error).split())
                    continue
            costs.append(_cost(run, known[key], past.get((run.name, len(run.config.peers)))))
    return Estimate(
        tuple(costs),
        unknown,
        sum(run.ended for run in runs),
        folder,
        shutil.disk_usage(existing(folder)).free,
        device_name(chosen),
        torch.cuda.mem_get_info(chosen)[0] if chosen.type == "cuda" else None,
        price_per_hour,
    )


def _runs(count: int) -> str:
    return "1 run has" if count == 1 else f"{count} runs have"


def _took(config: TrainConfig) -> float:
    """Seconds of both phases of a run that has ended."""
    summary = read_summary(Path(str(config.folder)))
    phases = (summary.get(name) or {} for name in ("mutual", "independent"))
    return sum(phase.get("wall_seconds") or 0.0 for phase in phases)


def existing(folder: Path) -> Path:
    """The folder, or the nearest around it that is there. Raises OSError."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


@contextmanager
def _kept(folder: Path, device: str, keep: bool) -> Iterator[dict[str, Measured]]:
    """What was measured on this device, by run, which grows within and is then kept."""
    path = folder / COSTS
    try:
        all_known = json.loads(path.read_text())
        known = {name: _measured_of(of) for name, of in all_known.get(device, {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # not there, or damaged
        all_known, known = {}, {}
    before = set(known)
    yield known
    if keep and set(known) != before:
        values = {name: dataclasses.asdict(found) for name, found in known.items()}
        text = json.dumps({**all_known, device: values}, indent=1)
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:  # other reproductions may begin now, too
                file.write(text.encode())


def _measured_of(values: Mapping[str, Any]) -> Measured:
    """Raises TypeError, ValueError or KeyError for values of which some are no numbers."""
    memory = values["memory"]
    return Measured(
        step=float(values["step"]),
        image=float(values["image"]),
        weights=int(values["weights"]),
        state=int(values["state"]),
        tensors=int(values["tensors"]),
        memory=None if memory is None else int(memory),
    )


def _left(config: TrainConfig) -> float:
    """The share of a run that is still to be trained, by its metrics."""
    folder, phases = Path(str(config.folder)), 1 + config.independent
    done = 0.0
    for phase in (folder, folder / INDEPENDENT)[:phases]:
        try:
            epochs = [r["epoch"] for r in read_metrics(phase) if r["kind"] == "epoch"]
        except InputError:  # it has not begun
            epochs = []
        images, size_of_batch = image_counts(config)[0], config.batch_size
        whole = config.epochs or config.iterations / max(1, images // size_of_batch)
        done += min(1.0, max(epochs, default=0) / whole)
    return 1 - done / phases


def _there(folder: Path) -> int:
    """Bytes that a run has written already. Groups have other names for some of its files."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum({file.st_ino: file.st_size for file in found}.values())


def _cost(run: Run, found: Measured, took: float | None) -> Cost:
    config = run.config
    images, tested = image_counts(config)
    steps = total_steps(config, max(1, images // config.batch_size))
    epochs = -(-steps // max(1, images // config.batch_size))
    evaluations = -(-epochs // config.eval_every)
    phases = 1 + config.independent
    seconds = phases * (steps * found.step + evaluations * tested * found.image)
    timed = "by a few steps" if took is None else "as a run that has ended"
    checkpoint = found.weights + found.state + ARCHIVE + OF_TENSOR * 3 * found.tensors
    files = _files(config, found, checkpoint, steps, evaluations, tested)
    return Cost(
        name=f"{run.name}, {config.groups} seeds in one run" if config.groups > 1 else run.name,
        seconds=(seconds if took is None else took) * _left(config),
        files=max(0, files - _there(Path(str(config.folder)))),
        spare=checkpoint,
        memory=found.memory,
        timed=timed,
    )


def _files(
    config: TrainConfig, found: Measured, checkpoint: int, steps: int, evaluations: int, tested: int
) -> int:
    """Bytes of a run folder. last.ckpt, peers/, best/ and what is said of the test images, of both
    phases; initial.ckpt; groups share the files of weights."""
    K, G = len(config.peers), config.groups
    saved = found.weights + OF_TENSOR // 4 * found.tensors
    side = image_shape(config)
    pictures = PICTURES * G * side[0] * side[1] * side[2]
    predictions = int((K + G) * tested * OF_PREDICTION) + pictures
    reid = isinstance(config, ReidConfig)
    readings = steps // config.log_every if config.log_every else 0
    epochs = -(-steps // max(1, image_counts(config)[0] // config.batch_size))
    numbers = (readings + epochs) * K * (8 + K) + evaluations * 8 * (K + 1)
    phase = checkpoint + 2 * saved + numbers * OF_NUMBER + SETTINGS
    phase += 0 if reid else predictions
    phase += numbers * EVENTS if config.tensorboard else 0
    phase += FIGURES * len(config.figures)
    phase += G * SETTINGS + numbers * OF_NUMBER if G > 1 else 0
    return phase * (1 + config.independent) + found.weights * config.independent


def image_counts(config: TrainConfig) -> tuple[int, int]:
    """Images that an epoch shows, and that an evaluation reads. Raises InputError for a data set of
    which these are not known."""
    if config.data not in IMAGES:
        raise InputError(f"nothing is known of the number of images of {config.data}")
    images, tested = STAND_IN if _is_stand_in(config) else IMAGES[config.data]
    labelled_alone = 0 if config.unlabelled_share else config.labelled
    return min(images, config.subset or images, labelled_alone or images), tested


def _is_stand_in(config: TrainConfig) -> bool:
    return isinstance(config, ReidConfig) and config.standin


def image_shape(config: TrainConfig) -> tuple[int, int, int]:
    """(channels, height, width)"""
    if isinstance(config, ReidConfig):
        return 3, config.height, config.width
    channels, height, width = record(config.data)["image_shape"]
    return channels, height, width


def measured(
    run: Run, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """Of a few steps of the run's peers on random images, and forward passes. Leaves threads,
    random generators and the device's memory as they were."""
    threads = torch.get_num_threads()
    try:
        return _measured(run, device, clock)
    finally:
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(run: Run, device: torch.device, clock: Callable[[], float]) -> Measured:
    config, cuda = run.config, device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        cohort, images, labels = _cohort(config, device, run.teachers)
        amp = resolve_amp(config.amp, device)
        networks = len(cohort) + len(cohort.teachers)
        loss = task_of(config).mutual_loss(config, networks).to(device)
        optimizer = optimizer_of(config, cohort)
        threads = (config.threads or torch.get_num_threads()) if device.type == "cpu" else None
        execution: Any = "eager" if config.deterministic else config.execution
        step = make_step(
            cohort, loss, optimizer, execution=execution, amp=amp, threads=threads,
            update=config.update, accumulate=config.accumulate,
        )  # fmt: skip
        cohort.train()
        one_step = _seconds(lambda: step(images, labels), device, clock)

        def forward() -> None:
            with torch.inference_mode(), amp.autocast():
                cohort(images)

        with evaluating(cohort):
            of_batch = _seconds(forward, device, clock)
        tensors = list(cohort.state_dict().values())
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        return Measured(
            step=one_step,
            image=of_batch / len(images),
            weights=sum(t.nbytes for t in tensors),
            state=sum(t.nbytes for t in state),
            tensors=len(tensors),
            memory=torch.cuda.max_memory_allocated(device) if cuda else None,
        )


def _cohort(
    config: TrainConfig, device: torch.device, teachers: Sequence[str]
) -> tuple[Cohort, Tensor, Tensor]:
    """Fresh peers, and a batch of random images and labels."""
    channels, *sides = image_shape(config)
    reid, data = isinstance(config, ReidConfig), config.data
    classes = IDENTITIES[_is_stand_in(config)] if reid else len(record(data)["classes"])
    build: dict[str, Any] = {"in_channels": channels, "image_size": sides}
    if isinstance(config, ReidConfig):
        build["head"] = ReidHead(config.pooling, config.neck, config.last_stride)
    cohort = Cohort(config.peers, classes, groups=config.groups, **build)
    cohort.teachers = [*Cohort(teachers, classes, seed=1, **build).peers] if teachers else []
    cohort.to(device)
    cohort.to(memory_format=torch.channels_last)
    images = torch.randn(config.batch_size, channels, *sides, device=device)
    labels = torch.randint(classes, (config.batch_size,), device=device)
    return cohort, images, labels


def _seconds(
    action: Callable[[], object], device: torch.device, clock: Callable[[], float]
) -> float:
    """The median of a few, after one that is not counted. The fastest would be the time of a
    machine on which nothing else runs."""

    def timed() -> float:
        began = clock()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    count = 1 if timed() > LONG else STEPS
    return median(timed() for _ in range(count))
