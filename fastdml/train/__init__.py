"""Training runs: `cifar100(...)`, `market1501(...)` and others, or `fit` with one's own data.

Settings are those of `TrainConfig`, for images of your own `FolderConfig` or for re-identification
`ReidConfig`, by name, and known to type checkers; `resume=True` goes on with a run, with its
settings. `root`, the folder of the data set's files, is by default "data", or the folder that the
resumed run recorded. `callbacks` are called at the end of each epoch and after each evaluation, see
`Callback`.

Each returns a `TrainResult`, or None after a dry run. Each raises InputError, one line with the
remedy, for a setting, a model, data or a folder that cannot be used; TrainingDiverged, also an
InputError, where a loss is no longer finite; and TrainingStopped, a SystemExit, after a signal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from fastdml.train.callbacks import (
    Callback,
    EndEvent,
    EpochEvent,
    EpochStartEvent,
    EvaluationEvent,
)
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.own_images import FolderConfig
from fastdml.train.config.reid import ReidConfig
from fastdml.train.config.sources import from_command_line, load_config, resolve
from fastdml.train.config.types import FolderSettings, ReidSettings, TrainSettings
from fastdml.train.result import TrainResult
from fastdml.train.run import fit, run
from fastdml.train.stopping import TrainingStopped
from fastdml.train.tasks.classification import evaluate
from fastdml.train.tasks.retrieval import RetrievalScores, extract_features
from fastdml.train.trainer import TrainingDiverged

__all__ = [
    "Callback",
    "EndEvent",
    "EpochEvent",
    "EpochStartEvent",
    "EvaluationEvent",
    "FolderConfig",
    "ReidConfig",
    "RetrievalScores",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingStopped",
    "cifar10",
    "cifar100",
    "digits",
    "dukemtmc",
    "evaluate",
    "extract_features",
    "fit",
    "folder",
    "from_command_line",
    "load_config",
    "market1501",
    "msmt17",
    "reid_folder",
    "run",
    "veri",
]


def cifar100(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[TrainSettings],
) -> TrainResult | None:
    """Trains peers on CIFAR-100, by default two ResNet-32 with the paper's settings."""
    return _train("cifar100", peers, root, callbacks, config)


def cifar10(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[TrainSettings],
) -> TrainResult | None:
    """Trains peers on CIFAR-10, by default two ResNet-32 with the paper's settings."""
    return _train("cifar10", peers, root, callbacks, config)


def market1501(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[ReidSettings],
) -> TrainResult | None:
    """Trains peers on Market-1501, by default two MobileNets with the paper's settings;
    recipe="strong" for those of the strong baseline. standin=True trains on pictures of CIFAR-100
    in Market-1501's layout instead, on a CPU in minutes, with CIFAR-100 below `root`."""
    return _train("market1501", peers, root, callbacks, config)


def dukemtmc(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[ReidSettings],
) -> TrainResult | None:
    """Trains peers on DukeMTMC-reID, with the settings of Market-1501."""
    return _train("dukemtmc", peers, root, callbacks, config)


def msmt17(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[ReidSettings],
) -> TrainResult | None:
    """Trains peers on MSMT17, with the settings of Market-1501."""
    return _train("msmt17", peers, root, callbacks, config)


def veri(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[ReidSettings],
) -> TrainResult | None:
    """Trains peers on the vehicles of VeRi-776, with the settings of Market-1501; with
    recipe="strong" at 256x256."""
    return _train("veri", peers, root, callbacks, config)


def reid_folder(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[ReidSettings],
) -> TrainResult | None:
    """Trains peers on a re-identification set of your own: folders train, query and gallery below
    `root`, and `pattern` to tell identity and camera from the files' names."""
    return _train("reid_folder", peers, root, callbacks, config)


def folder(
    peers: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[FolderSettings],
) -> TrainResult | None:
    """Trains peers on images of your own: below `root` class folders in train/ and val/ or test/,
    or class folders alone, or CSV files of path,label."""
    return _train("folder", peers, root, callbacks, config)


def digits(
    peers: Sequence[str] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **config: Unpack[TrainSettings],
) -> TrainResult | None:
    """Trains peers on scikit-learn's handwritten digits: seconds, and nothing to download."""
    return _train("digits", peers, None, callbacks, config)


def _train(
    data: str,
    peers: Sequence[str] | None,
    root: str | os.PathLike | None,
    callbacks: Sequence[Callback],
    given: Mapping[str, Any],
) -> TrainResult | None:
    changes = {**given}
    if peers is not None:
        changes["peers"] = peers
    if root is not None:
        changes["root"] = root
    return run(resolve(data, changes), callbacks=callbacks)
