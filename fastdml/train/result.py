"""What a training run came to, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdml.train.scores import Scores
from fastdml.train.settings import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    folder: Path
    config: TrainConfig
    peers: tuple[str, ...]  # display names, in order
    parameters: tuple[int, ...]  # trainable parameters of each peer
    history: list[dict[str, Any]]  # the epoch records of metrics.jsonl, in order
    scores: Scores | None  # of the last weights; None without an evaluation
    best_epoch: float  # epochs trained when the peers' mean top-1 (mAP) was best; 0: not evaluated
    best_scores: Scores | None
    weights: dict[str, Path]  # "last" and "best": folders that Cohort.load reads
    images_per_second: float  # of training alone, first steps left out; 0 if too short to tell
    data_wait: float  # share of that time spent waiting for batches, 0 to 1
    seconds: float  # of training and evaluation, over all resumptions
    skipped_steps: int  # updates left out because an fp16 gradient overflowed
    device: str  # for instance "cpu" or "NVIDIA H100"
    precision: str  # of the networks: "fp32", "bf16" or "fp16"
    execution: str | None  # of the steps, for instance "eager"
    threads: int | None  # of the steps, on a CPU
    independent: TrainResult | None = None  # the same peers trained without the KL term
