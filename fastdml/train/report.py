"""What a run leaves to read: metrics.jsonl, TensorBoard events, a summary, a table.

Everything here takes plain numbers, lists and folders; the loop fetches device tensors first, in
one transfer a log point. One log point costs a flushed line and a queued TensorBoard event.

A run folder holds, from this module:
    metrics.jsonl      one object a line, in order of step; all else is drawn from it
        {"kind": "peers", "step": 0, "names": ["resnet20", "resnet20-1"]}
        {"kind": "train", "step": 20, "epoch": 0.13, "time": ..., "ce": [K], "kl": [K],
         "pairwise_kl": [[K] * K], ...}        means since the reading before, losses in nats
        {"kind": "epoch", ...}                 the same, means over a whole epoch
        {"kind": "test", "step": 156, "epoch": 1.0, "time": ..., "top1": [K], "ensemble_top1": ..}
                                               (of re-identification "mAP", "rank1" and so on)
        `step` counts batches done, `time` is in seconds since 1970, null stands for NaN and inf.
    tensorboard/       the same scalars: KIND/NAME, with /PEER where there is one a peer
    summary.json       `fastdml.train.figures` draws the pictures beside it
    independent/       the comparison without the KL term, a run folder of the same form
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fastdml import __version__
from fastdml.errors import InputError, require
from fastdml.files import create, sync, write_atomically, writing
from fastdml.paths import expanded
from fastdml.train.tasks.scores import main_name

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
INDEPENDENT = "independent"
VERSIONED = ("torch", "triton", "numpy")
# By the score that a run is judged by: those that its reports lead with, as (score, label).
HEADLINES = {"top1": (("top1", "accuracy"),), "mAP": (("mAP", "mAP"), ("rank1", "rank1"))}
ENSEMBLES = {
    "top1": "mean of the mutual peers' probabilities",
    "mAP": "the mutual peers' features, concatenated",
}


class MetricsLog:
    """Appends log points to a run folder's metrics.jsonl and TensorBoard events.

    A new run needs a folder without metrics. `resume_step=n` keeps what was logged up to and
    including step n and forgets the rest, in both places, so that a step done again is there once:
    log a step before the checkpoint of that step is written.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.path = Path(folder) / METRICS
        self.names = list(names)
        if resume_step is None:
            if self.path.exists():
                raise InputError(f"{self.path} holds another run's metrics: choose a new folder")
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [{"kind": "peers", "step": 0, "names": self.names}]
        else:
            kept = [r for r in read_metrics(folder) if r["step"] <= resume_step]
        write_atomically(self.path, "".join(f"{to_json(record)}\n" for record in kept))
        self.file = self.path.open("ab")
        self.events = Events(self.path.parent / "tensorboard", self.names) if tensorboard else None
        for record in kept:
            self._to_tensorboard(record)

    def log(self, kind: str, step: int, epoch: float, **values: Any) -> None:
        """Adds one log point: numbers, lists of one number a peer, or matrices (K, K)."""
        record = {"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}
        with writing(self.path):
            self.file.write(f"{to_json(record)}\n".encode())
            self.file.flush()
        self._to_tensorboard(record)

    def sync(self) -> None:
        """Forces what was logged to disk."""
        with writing(self.path):
            sync(self.file)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what was not flushed, which `log` has raised
            self.file.close()
        if self.events:
            self.events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _to_tensorboard(self, record: dict[str, Any]) -> None:
        if self.events is None:
            return
        try:
            self.events.add(record)
        except OSError as error:
            print(
                f"TensorBoard's events are no longer written ({error.strerror}); {METRICS} goes on",
                file=sys.stderr,
            )
            self.events.close()
            self.events = None


class Events:
    """A new file of TensorBoard's events in `folder`, in place of those there: a file of events
    cannot be cut, so it is written anew from what is kept.

    Written at once, not by the thread of TensorBoard's own writer, whose errors have no owner.
    """

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
        """The numbers of a log point: KIND/NAME, and KIND/NAME/PEER."""
        values = {}
        for key, value in record.items():
            tag = f"{record['kind']}/{key}"
            if key in ("kind", "step", "time", "names"):
                continue
            if isinstance(value, (int, float)):
                values[tag] = value
            elif isinstance(value, (list, tuple)):
                for name, one in zip(self.names, value, strict=True):
                    if isinstance(one, (int, float)):  # rows of a matrix are for pairwise_kl.png
                        values[f"{tag}/{name}"] = one
        if not values:
            return
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        )
        when = record.get("time") or time.time()
        self._write(self._event(wall_time=when, step=record["step"], summary=summary))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self.file.flush()


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
    """What is drawn from the file relies on its form."""
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


def write_summary(
    folder: str | Path,
    *,
    config: dict[str, Any],
    peers: Sequence[str],
    parameters: Sequence[int],
    device: str,
    execution: str | None,
    threads: int | None,
    command: str,
    mutual: dict[str, Any],
    independent: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes summary.json and returns what it holds; its date is that of the end, in UTC.

    `mutual` and `independent` are each {"scores": ClassificationScores or RetrievalScores as a
    dict, or None where nothing was evaluated, "images_per_second": float, "wall_seconds": float}
    and whatever else is worth keeping.
    """
    runs = {"mutual": mutual, "independent": independent}
    headlines = HEADLINES[_kind(mutual["scores"])]
    summary = {
        "config": config,
        "versions": versions(),
        "device": device,
        "execution": execution,
        "threads": threads,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "peers": [
            {
                "name": name,
                "parameters": count,
                **{
                    f"{label}_{run}": _score(values, key, k)
                    for key, label in headlines
                    for run, values in runs.items()
                },
            }
            for k, (name, count) in enumerate(zip(peers, parameters, strict=True))
        ],
        **{f"ensemble_{r}": _score(v, f"ensemble_{headlines[0][0]}") for r, v in runs.items()},
        "mutual": mutual,
        "independent": independent,
    }
    text = to_json(summary, indent=2)
    write_atomically(Path(folder) / SUMMARY, f"{text}\n")
    return json.loads(text)


def summary_table(summary: dict[str, Any]) -> str:
    """The comparison every paper's table makes: accuracies in % of the test set, or mAP and rank-1
    in % over the queries."""
    kind = _kind(summary["mutual"]["scores"])
    ensemble = _percent(summary["ensemble_mutual"])
    rate = _rate(summary["mutual"])
    labels = [label for _, label in HEADLINES[kind]]
    prefixes = ("",) if kind == "top1" else ("mAP ", "rank-1 ")
    rows = [
        (
            "peer",
            "parameters",
            *(f"{prefix}{run} %" for prefix in prefixes for run in ("independent", "mutual")),
            f"{prefixes[0]}ensemble %",
            "images/s",
        )
    ]
    rows += [
        (
            peer["name"],
            f"{peer['parameters']:,}",
            *(_percent(peer[f"{x}_{run}"]) for x in labels for run in ("independent", "mutual")),
            ensemble,
            rate,
        )
        for peer in summary["peers"]
    ]
    note = f"ensemble: {ENSEMBLES[kind]}"
    if summary["independent"]:
        note += (
            f" (independent peers': {_percent(summary['ensemble_independent'])} %)"
            f"; images/s: all peers together (independent:"
            f" {_rate(summary['independent'])})"
        )
    else:
        note += "; images/s: all peers together"
    return f"{fixed_columns(rows)}\n{note}"


def retrieval_table(names: Sequence[str], scores: dict[str, dict[str, Any] | None]) -> str:
    """Every score of each peer and of the ensemble, a block of rows a protocol, from
    `Retrieval.all_scores` with RetrievalScores as dicts."""
    columns = ("rank1", "rank5", "rank10", "mAP", "mINP")
    rows = [("peer", "query", "re-ranked", "rank-1 %", "rank-5 %", "rank-10 %", "mAP %", "mINP %")]
    for protocol, values in scores.items():
        query, _, reranked = protocol.partition("_")
        if values is None:
            continue
        kind = (query, "yes" if reranked else "no")
        for k, name in enumerate(names):
            rows.append((name, *kind, *(_percent(values[c][k]) for c in columns)))
        ensemble = (_percent(values[f"ensemble_{c}"]) for c in columns)
        rows.append(("ensemble", *kind, *ensemble))
    note = f"{scores['single']['queries']:,} queries; ensemble: the peers' features, concatenated"
    if scores["multi"] is None:
        note += "; no multiple queries: the folder gt_bbox is not there"
    return f"{fixed_columns(rows)}\n{note}"


def scores_table(names: Sequence[str], scores: dict[str, Any]) -> str:
    """Every score of each peer and of the ensemble, from a ClassificationScores as a dict."""
    columns = ("top1", "top5", "ece", "nll", "entropy")
    rows = [("peer", "top-1 %", "top-5 %", "ECE %", "NLL nats", "entropy nats")]
    per_peer = [[scores[c][k] for c in columns] for k in range(len(names))]
    per_peer.append([scores[f"ensemble_{c}"] for c in columns])
    for name, (top1, top5, ece, nll, entropy) in zip([*names, "ensemble"], per_peer, strict=True):
        rows.append(
            (name, _percent(top1), _percent(top5), _percent(ece), f"{nll:.4f}", f"{entropy:.4f}")
        )
    table = f"{fixed_columns(rows)}\n{scores['rows']:,} test images"
    broken = [f"{n}: {bad}" for n, bad in zip(names, scores["nonfinite"], strict=True) if bad]
    return table + (f"; outputs that are not finite: {', '.join(broken)}" if broken else "")


def fixed_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first to the left, numbers to the right, a rule under row 0."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"fastdml": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: Any, threads: int | None = None) -> str:
    """The hardware behind a torch device, as a table names it; of a CPU with the number of threads,
    by default torch's."""
    import torch

    from fastdml.engine.auto import count_of_threads

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((v.strip() for k, _, v in fields if k.strip() == "model name"), model)
    return f"{model}, {count_of_threads(threads or torch.get_num_threads())}"


def duration(seconds: float) -> str:
    """In the unit that suits it, for instance "7.5 min"."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, length = next((u, n) for u, n in units if seconds >= 1.5 * n or u == "s")
    count = seconds / length
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads: it has no NaN and no inf, null stands in their place."""
    return json.dumps(_finite_or_none(value), indent=indent)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kind(scores: dict[str, Any] | None) -> str:
    return "top1" if scores is None else main_name(scores)


def _score(run: dict[str, Any] | None, name: str, peer: int | None = None) -> float | None:
    if run is None or run["scores"] is None:
        return None
    return run["scores"][name] if peer is None else run["scores"][name][peer]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def _rate(run: dict[str, Any]) -> str:
    rate = run["images_per_second"]
    return f"{rate:,.0f}" if rate else "-"  # 0: the run was too short to tell
