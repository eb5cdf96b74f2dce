"""The interface of a task: what peers learn, from data to losses, scores and reports.

A task is one module: a settings class, a `Scoring` and a subclass of `Task` under `@register_task`,
imported by `fastdml.train.tasks`. The trainer, the reports and the commands find it by a run's
settings or by the name of a data set, and know none by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.data import HINT, dataset, dataset_names
from fastdml.engine.amp import Amp
from fastdml.errors import InputError
from fastdml.grouped_loss import GroupedLoss
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.report.scoring import Scoring
from fastdml.train.batches import Batches, check_labels
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.fields import field_types

Evaluate = Callable[[Cohort], Any]  # to its scores


class Prepared(NamedTuple):
    """The peers and the data of a run."""

    cohort: Cohort  # on the host: the run moves to its device what belongs there
    train: Any  # batches, as `fastdml.train.fit` takes them
    test: Any | Evaluate | None  # batches, or what gives a cohort's scores
    validation: Any | Evaluate | None = None  # the same, of images that choose the best weights


class Evaluation(NamedTuple):
    """The result of `fastdml evaluate`."""

    scores: Mapping[str, Any]  # plain values, for --json
    table: str
    files: Sequence[Path] = ()  # pictures drawn
    settings: Mapping[str, Any] = MappingProxyType({})  # what the scores depend on, for --json


class Task:
    """A task. A subclass defines `prepare`, `score` and `evaluate`, and overrides what differs from
    the defaults here."""

    name: ClassVar[str]  # which data sets are registered with
    title: ClassVar[str]  # before "runs", in headings
    settings: ClassVar[type[TrainConfig]]  # no other task's
    scoring: ClassVar[Scoring]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # what a data set changes in defaults
    choices: ClassVar[tuple[str, ...]] = ()  # settings that decide the defaults of others
    shown_by_loader: ClassVar[frozenset[str]] = frozenset()
    """Settings in `recorded` that a loader within another does not show."""
    defaults_of_fit: ClassVar[frozenset[str]] = frozenset()
    """Settings that `fit` of earlier versions recorded as the defaults, whatever ran."""
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Of `fastdml evaluate` for runs of this task alone: --option to argparse's arguments."""
    in_python: ClassVar[str] = "fastdml.train.evaluate(cohort, batches) scores it on batches"
    """How peers trained on data of one's own, which no command can read, are scored."""

    @property
    def data(self) -> tuple[str, ...]:
        """The names of its data sets."""
        return dataset_names(self.name)

    # --- before training ---

    def preset(self, data: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of a data set, where `chosen` has some of the settings in `choices`."""
        return dict(self.presets.get(data, {}))

    def prepare(
        self,
        config: Any,
        device: torch.device,
        hint: str = HINT,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> AbstractContextManager[Prepared]:
        """Peers and data of the run that `config` describes, with `config.validation` also the data
        that the best weights are chosen on; files and memory that they use are released when the
        context ends. Downloads nothing in a dry run. hint: how to ask for a download, for
        messages. rank, world: which share of every training batch is wanted, as loaders take
        them."""
        raise NotImplementedError

    def check_labels(
        self, labels: Tensor, images: Tensor, num_classes: int, where: str, values: bool
    ) -> None:
        """Raises InputError for labels of a batch that peers cannot learn: by default for all but
        class indices (N,). images: (N, channels, H, W). where: the batch, for the message. values:
        whether to check the values too, which waits for the device."""
        check_labels(labels, images, num_classes, where, values)

    def recorded(self, cohort: Cohort, train: Batches, images: Tensor) -> dict[str, Any]:
        """Values for those of the task's own settings that show in the caller's own data, which
        `fit` records. images: the first batch, (N, channels, H, W)."""
        return {}

    # --- training ---

    def mutual_loss(self, config: Any, K: int, **options: Any) -> MutualLoss:
        """The loss on K peers' logits. options: more options of `MutualLoss`. For labels of another
        kind, return a subclass of it with its own `value_and_grad`."""
        kind: Any = MutualLoss
        if config.groups > 1:
            peers = len(config.peers)
            kind = partial(GroupedLoss, config.groups, peers, K - peers)
        return kind(
            temperature=config.temperature,
            ce_weight=config.ce_weight,
            kl_weight=config.kl_weight,
            target=config.target,
            gate=config.gate,
            divergence=config.divergence,
            jsd_beta=config.jsd_beta,
            label_smoothing=config.label_smoothing,
            **options,
        )

    def metric_loss(self, config: Any, cohort: Cohort) -> MetricLoss | None:
        """The losses on features beside the mutual loss, with fresh centres; None: there are
        none."""
        return None

    # --- evaluation ---

    def score(self, cohort: Cohort, test: Batches, amp: Amp) -> Any:
        """Scores on batches (images, labels), during training; the cohort is in evaluation mode.
        They need not be the task's own, if a registered task's."""
        raise NotImplementedError

    def scorer(self, test: Batches, amp: Amp) -> Evaluate:
        """What scores a cohort on these batches, time and again during a run. A task whose runs
        shall keep predictions gives a `predictions.Scorer`."""
        return partial(self.score, test=test, amp=amp)

    def evaluate(
        self,
        cohort: Cohort,
        config: Any,
        device: torch.device,
        options: Mapping[str, Any],
        *,
        run: Path,
        hint: str = HINT,
    ) -> Evaluation:
        """Scores and their table on the test data of the set `config.data` below `config.root`, for
        the command. options: values of `self.options` by argparse's names. run: the run's folder.

        Raises InputError where the peers were not trained on such data, or an option is wrong.
        """
        raise NotImplementedError

    def known_set(self, record: Mapping[str, Any]) -> str | None:
        """The data set that peers with this `Cohort.record` were trained on, if it tells."""
        return None


def prepared(
    task: Task, config: Any, device: torch.device, hint: str, rank: int = 0, world: int = 1
) -> AbstractContextManager[Prepared]:
    """`task.prepare`, for one of `world` columns of a mesh. Raises InputError where a task does not
    take them, whose batches would be the same on all."""
    if world == 1:
        return task.prepare(config, device, hint)
    takes = inspect.signature(task.prepare).parameters
    if not {"rank", "world"} <= takes.keys():
        raise InputError(
            f"{task.title} runs cannot be cut into {world} columns: {type(task).__name__}.prepare "
            "must take rank and world, and give them to its loader"
        )
    return task.prepare(config, device, hint, rank=rank, world=world)


TASKS: list[Task] = []
Registered = TypeVar("Registered", bound=type[Task])


def register_task(kind: Registered) -> Registered:
    """Adds a task, by decorating its class. Raises ValueError where a task has its name or settings
    already."""
    for task in TASKS:
        other = type(task).__name__
        if kind.name == task.name:
            raise ValueError(
                f"the name {kind.name!r} of {kind.__name__} is that of {other}: give another"
            )
        if kind.settings is task.settings:
            raise ValueError(
                f"the settings {kind.settings.__name__} of {kind.__name__} are those of {other}: "
                "give it a subclass of them"
            )
    TASKS.append(kind())
    return kind


def task_of(config: TrainConfig) -> Task:
    """The task that these settings are for. Raises InputError where there is none."""
    for kind in type(config).__mro__:
        for task in TASKS:
            if task.settings is kind:
                return task
    raise InputError(f"no task has settings {type(config).__name__}: register_task adds one")


def task_for(data: str, names: Iterable[str] = ()) -> Task:
    """The task of a data set. For the user's own data, the first of the tasks that have most of the
    settings in `names`."""
    if data in dataset_names():
        wanted = dataset(data).task
        for task in TASKS:
            if task.name == wanted:
                return task
        raise InputError(f"nothing trains on {data}: no task is called {wanted!r}")
    return max(TASKS, key=lambda task: len(field_types(task.settings).keys() & set(names)))


def scoring_of(scores: Any) -> Scoring:
    """The `Scoring` that fits these scores, a dataclass or a dict, by their names; for None, or
    names of no task, the first task's."""
    if scores is None:
        return TASKS[0].scoring
    names = set(scores) if isinstance(scores, Mapping) else set(vars(scores))
    kinds = [task.scoring for task in TASKS if task.scoring.leading in names]
    return max(kinds, key=lambda kind: -len(kind.names ^ names), default=TASKS[0].scoring)
