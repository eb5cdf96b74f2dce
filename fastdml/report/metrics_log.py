"""metrics.jsonl, written while a run trains; `fastdml.report.loggers` get the same.

Everything here takes plain numbers, lists and folders; the trainer fetches device tensors first, in
one transfer a log point. One log point costs a flushed line and a queued TensorBoard event.

A run folder holds, from this module:
    metrics.jsonl      one object a line, in order of step; tables and pictures are made from it
        {"kind": "peers", "step": 0, "names": ["resnet20", "resnet20-1"]}
        {"kind": "train", "step": 20, "epoch": 0.13, "time": ..., "ce": [K], "kl": [K],
         "pairwise_kl": [[K] * K], ...}        means since the reading before, losses in nats;
                                               of each teacher too, "teacher_kl/NAME": [K]
        {"kind": "epoch", ...}                 the same, means over a whole epoch
        {"kind": "test", "step": 156, "epoch": 1.0, "time": ..., "top1": [K], "ensemble_top1": ..}
                                               (of re-identification "mAP", "rank1" and so on)
        {"kind": "validation", ...}            the same of validation images. Where they choose the
                                               best weights, "test" is there at the end alone, once
                                               with "weights": "last" and once with "best"
        `step` counts batches done, `time` is in seconds since 1970, null stands for NaN and inf.
    tensorboard/       the same scalars: KIND/NAME, with /PEER where there is one a peer
    metrics.csv        of epochs and evaluations, where it is asked for
    independent/       the comparison without the KL term, a run folder of the same form
    groups/G/          of peers in groups, which are an ensemble each: group_NAME: [K] has for each
                       peer its group's ensemble, ensemble_NAME is the mean over the groups, and
                       each group has a run folder of the same form, written when the run ends
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdml.errors import InputError
from fastdml.files import sync, write_atomically, writing
from fastdml.paths import expanded
from fastdml.peer_groups import GROUPS
from fastdml.report.loggers import TABLE, Events, Logger, Table, WeightsAndBiases

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
INDEPENDENT = "independent"
TEACHER_KL = "teacher_kl/"  # before a teacher's name: T**2 KL(teacher || peer), one a peer

Records = list[dict[str, Any]]


def group_folder(folder: Path, g: int) -> Path:
    """Of group g in the run `folder`, or in its independent one."""
    if folder.name == INDEPENDENT:
        return folder.parent / GROUPS / str(g) / INDEPENDENT
    return folder / GROUPS / str(g)


def group_folders(folder: Path) -> list[Path]:
    """Those of a run that has ended, in order; none where its peers are one group."""
    found = [path for path in folder.glob(f"{GROUPS}/*") if (path / METRICS).is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


class MetricsLog:
    """Appends log points to a run folder's metrics.jsonl, and gives them to the loggers.

    A new run needs a folder without metrics. `resume_step=n` keeps the log points up to and
    including step n and removes the others, in all files, so that a step that is done again is
    there once. For this, log a step before its checkpoint is written.

    tensorboard, csv: write events, and metrics.csv. wandb: the run's settings, to log it to Weights
    & Biases; None: not.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        csv: bool = False,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(folder) / METRICS
        self.names = list(names)
        if resume_step is None:
            if self.path.exists():
                raise InputError(f"{self.path} holds another run's metrics: choose a new folder")
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            before: Records = [{"kind": "peers", "step": 0, "names": self.names}]
        else:
            before = read_metrics(folder)
        kept = [r for r in before if resume_step is None or r["step"] <= resume_step]
        write_atomically(self.path, "".join(f"{to_json(record)}\n" for record in kept))
        self.file = self.path.open("ab")
        self.loggers: list[Logger] = []
        if tensorboard:
            self.loggers.append(Events(self.path.parent / "tensorboard", self.names))
        if csv:
            self.loggers.append(Table(self.path.parent / TABLE, self.names))
        if wandb is not None:
            self.loggers.append(self._weights_and_biases(wandb, before))
        for record in kept:
            self._to_loggers(record)

    def _weights_and_biases(self, settings: Mapping[str, Any], before: Records) -> Logger:
        folder = self.path.parent.resolve()
        names = [folder.name]
        if folder.name == INDEPENDENT:
            names = [folder.parent.name, folder.name]
        logged = {(record["kind"], record["step"]) for record in before}
        return WeightsAndBiases(
            self.path.parent, self.names, settings, logged, run_name="-".join(names), group=names[0]
        )

    def log(self, kind: str, step: int, epoch: float, **values: Any) -> None:
        """Adds one log point: numbers, lists of one number a peer, or matrices (K, K)."""
        record = {"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}
        with writing(self.path):
            self.file.write(f"{to_json(record)}\n".encode())
            self.file.flush()
        self._to_loggers(record)

    def sync(self) -> None:
        """Forces what was logged to disk."""
        with writing(self.path):
            sync(self.file)

    def close(self, failed: bool = False) -> None:
        with contextlib.suppress(OSError):  # of what was not flushed, which `log` has raised
            self.file.close()
        for one in self.loggers:
            one.close(failed)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(failed=exception[0] is not None)

    def _to_loggers(self, record: dict[str, Any]) -> None:
        for one in list(self.loggers):
            try:
                one.add(record)
            except OSError as error:
                logger.warning(
                    "%s are no longer written (%s); %s goes on", one.title, error.strerror, METRICS
                )
                one.close(failed=True)
                self.loggers.remove(one)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Every log point of a run; a last line cut short by a killed process is left out."""
    path = expanded(folder) / METRICS
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file")  # reading a pipe could wait for ever
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {folder} is not the folder of a run") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line.decode()))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise InputError(f"{path}, line {number}, is not a JSON object") from None
    _check_metrics(records, path)
    return records


def _check_metrics(records: list[Any], path: Path) -> None:
    """Raises InputError for a record of another form than the pictures rely on."""
    remedy = "restore the file from a copy, or move it away and go on without what it holds"
    names = records[0].get("names") if records and isinstance(records[0], dict) else None
    first = {"kind": "peers", "step": 0, "names": names}
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not names or records[0] != first:
        raise InputError(f"{path} does not begin with the peers' names: {remedy}")
    for number, record in enumerate(records[1:], 2):
        if not _is_log_point(record, len(names)):
            raise InputError(
                f"{path}, line {number}, is no log point of {len(names)} peers: {remedy}"
            )


def _is_log_point(record: Any, K: int) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return False
    lists = [value for value in record.values() if isinstance(value, list)]
    rows = [row for value in lists for row in value if isinstance(row, list)]
    values = [v for v in record.values() if not isinstance(v, list)]
    values += [v for row in (*lists, *rows) for v in row if not isinstance(v, list)]
    return (
        type(record.get("step")) is int
        and isinstance(record.get("epoch"), (int, float))
        and all(len(row) == K for row in (*lists, *rows))
        and all(v is None or isinstance(v, (int, float, str)) for v in values)
    )


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads: it has no NaN and no inf, null stands in their place."""
    return json.dumps(_finite_or_none(value), indent=indent)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
