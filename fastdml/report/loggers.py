"""What gets a run's log points beside metrics.jsonl: TensorBoard, a CSV file, Weights & Biases.

Each takes records as metrics.jsonl has them, in order of step. A resumed run gives a new logger all
that is kept: files are written anew from it, and Weights & Biases, which takes nothing back, gets
what it has not got.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastdml.errors import InputError, one_line, require
from fastdml.files import create, write_atomically, writing

logger = logging.getLogger(__name__)

TABLE = "metrics.csv"
ROWS = ("epoch", "validation", "test")  # kinds of records that are in the table
WANDB_ID = "wandb.id"  # holds the id of the run there


class Logger(Protocol):
    title: str  # for messages, in the plural

    def add(self, record: dict[str, Any]) -> None:
        """Takes a log point. Raises OSError where it cannot be written."""

    def close(self, failed: bool = False) -> None:
        """failed: the training ends by an error, or is interrupted."""


def scalars(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The numbers of a log point: KIND/NAME, and KIND/NAME/PEER where there is one a peer. Of the
    best weights, where those are evaluated beside the last, KIND is KIND_best."""
    values: dict[str, float] = {}
    kind = record["kind"] + ("_best" if record.get("weights") == "best" else "")
    for key, value in record.items():
        tag = f"{kind}/{key}"
        if key in ("kind", "step", "time", "names"):
            continue
        if isinstance(value, (int, float)):
            values[tag] = value
        elif isinstance(value, (list, tuple)):
            for name, one in zip(names, value, strict=True):
                if isinstance(one, (int, float)):  # rows of a matrix are for pairwise_kl.png
                    values[f"{tag}/{name}"] = one
    return values


class Events:
    """A new file of TensorBoard's events in `folder`, in place of those there: a file of events
    cannot be cut, so it is written anew from what is kept.

    Written at once, not by the thread of TensorBoard's own writer, whose errors have no owner.
    """

    title = "TensorBoard's events"

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        protos = "tensorboard.compat.proto"
        self._event = require(f"{protos}.event_pb2", "train").Event
        self._summary = require(f"{protos}.summary_pb2", "train").Summary
        records = require("tensorboard.summary.writer.record_writer", "train")
        self.names = names
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            now = time.time()
            name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.0"
            self.file = create(folder / name)
            self._writer = records.RecordWriter(self.file)
            self._write(self._event(wall_time=now, file_version="brain.Event:2"))

    def add(self, record: dict[str, Any]) -> None:
        values = scalars(record, self.names)
        if not values:
            return
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        )
        when = record.get("time") or time.time()
        self._write(self._event(wall_time=when, step=record["step"], summary=summary))

    def close(self, failed: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self.file.flush()


class Table:
    """metrics.csv: a row an epoch, with the evaluations at its end.

    Columns are step, epoch, time (seconds since 1970) and the names that TensorBoard shows. They
    keep their places: those that the first evaluation brings come behind the others. A value that
    is not there, or not finite, is empty.
    """

    title = f"the rows of {TABLE}"

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.names = names
        self.columns = ["step", "epoch", "time"]
        self.rows: list[dict[str, Any]] = []
        write_atomically(path, self._lines([self.columns]))
        with writing(path):
            self.file = path.open("r+b")
        self.last = 0  # where the last row begins

    def add(self, record: dict[str, Any]) -> None:
        if record["kind"] not in ROWS:
            return
        values = {name: record.get(name) for name in self.columns[:3]}
        values |= {
            tag: value
            for tag, value in scalars(record, self.names).items()
            if math.isfinite(value) and not tag.endswith("/epoch")  # which has a column
        }
        more = [name for name in values if name not in self.columns]
        self.columns += more
        if self.rows and self.rows[-1]["step"] == record["step"]:
            self.rows[-1].update(values)
        else:
            self.rows.append(values)
            self.last = self.file.seek(0, os.SEEK_END)
        text = self._lines([self._cells(self.rows[-1])])
        if more:
            above = self._lines([self.columns, *map(self._cells, self.rows[:-1])])
            self.last, text = len(above), above + text
        self.file.seek(0 if more else self.last)
        self.file.write(text)
        self.file.truncate()
        self.file.flush()

    def close(self, failed: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        return [row.get(name, "") for name in self.columns]

    def _lines(self, rows: Sequence[Sequence[Any]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


class WeightsAndBiases:
    """A run at Weights & Biases, by its own client, which reads its own settings from the
    environment: WANDB_PROJECT (by default "fastdml"), WANDB_MODE and others. The run's id stays in
    the folder, so that a resumed run goes on there too.

    names: of the peers. settings: shown there. logged: the (kind, step) of log points that an
    earlier process has logged. run_name: there, beside others of its group. Raises MissingExtra
    without the client, InputError where it cannot start, for instance without a login.
    """

    title = "log points for Weights & Biases"

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings: Mapping[str, Any],
        logged: Collection[tuple[str, int]],
        *,
        run_name: str,
        group: str,
    ) -> None:
        self.names = names
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its errors, to its makers
        wandb = require("wandb", "wandb")
        file = folder / WANDB_ID
        resumes = file.exists()
        run_id = file.read_text().strip() if resumes else uuid.uuid4().hex[:8]
        self.logged = set(logged) if resumes else set()
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastdml"),
                group=group,
                name=run_name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # of its client there are many kinds
            raise InputError(
                f"Weights & Biases cannot start ({one_line(error)}): set WANDB_MODE=offline in the "
                "environment, log in by `wandb login`, or leave wandb out; then resume"
            ) from error
        write_atomically(file, f"{run_id}\n")
        if self.run.offline:
            where = f"offline, for `wandb sync {folder / 'wandb'}/offline-run-*`"
        else:
            where = self.run.url
        logger.info("Weights & Biases: %s", where)

    def add(self, record: dict[str, Any]) -> None:
        values = scalars(record, self.names)
        if not values or (record["kind"], record["step"]) in self.logged:
            return
        try:
            self.run.log(values, step=record["step"])
        except Exception as error:
            raise OSError(errno.EIO, one_line(error)) from error

    def close(self, failed: bool = False) -> None:
        with contextlib.suppress(Exception):  # training does not depend on it
            self.run.finish(exit_code=int(failed))
