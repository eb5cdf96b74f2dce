"""Records of reproductions that nobody made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdml.reproduce.record import Record, RowRecord, Side, TrainingRecord

VERSIONS = {"fastdml": "1.2.3", "torch": "2.11.0"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def row(label: str = "ResNet-8 x2: peer 1", **changes: Any) -> RowRecord:
    baseline = Side("independent", 68.99, (60.0, 61.0, 59.5))
    ours = Side("mutual", 71.19, (62.0, 62.0, 61.5))
    return replace(RowRecord(label, baseline, ours), **changes)


def training(seed: int, **changes: Any) -> TrainingRecord:
    command = "fastdml train digits --peers resnet8 resnet8 --independent"
    first = TrainingRecord(
        *("digits-resnet8-x2", seed, command, "AMD EPYC, 1 thread", 1, "eager", VERSIONS),
        *("2026-01-02T03:04:05+00:00", 90.0, (COMMIT,)),
    )
    return replace(first, **changes)


def record(*rows: RowRecord, **changes: Any) -> Record:
    first: dict[str, Any] = {
        "experiment": "table2",
        "title": "Top-1 accuracy of two peers",
        "place": "Table 2",
        "scale": "small",
        "changes": ("20,000 of 50,000 training images", "8 epochs in place of 200"),
        "seeds": (0, 1, 2),
        "rows": rows or (row(),),
        "trainings": tuple(training(seed) for seed in (0, 1, 2)),
        "provenance": {
            "command": "fastdml reproduce table2 --scale small",
            "versions": VERSIONS,
            "commit": COMMIT,
            "device": "AMD EPYC, 1 thread",
            "date": "2026-01-02T03:04:05+00:00",
            "seconds": 300.0,
        },
        "notes": ("Of the last weights.",),
    }
    return Record(**{**first, **changes})
