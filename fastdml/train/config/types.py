"""The settings of `cifar100(...)` and the others, for type checkers: a name that is no setting, or
a value of another kind, is an error before anything runs.

They are the fields of `TrainConfig`, `FolderConfig` and `ReidConfig`, where what each means and its
default stand; without `peers` and `root`, which are parameters, and `data`, which the function's
name says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypedDict


class TrainSettings(TypedDict, total=False):
    download: bool
    subset: int
    validation: float
    labelled: int
    unlabelled: str | os.PathLike
    unlabelled_share: float
    batch_size: int
    pad: int
    flip: bool
    augment: Literal["none", "standard", "trivial", "rand"]
    loader: Literal["auto", "resident", "dali", "torch"]
    groups: int
    teachers: Sequence[str]
    cache_teachers: bool
    pretrained: bool
    temperature: float
    temperature_schedule: Literal["constant", "linear", "cosine"]
    temperature_end: float | None
    temperature_warmup_epochs: float
    ce_weight: float
    kl_weight: float
    kl_schedule: Literal["constant", "linear", "cosine"]
    kl_weight_end: float | None
    kl_warmup_epochs: float
    target: Literal["peers", "ensemble", "ensemble_logits"]
    gate: Literal["none", "correct", "best", "confidence", "entropy"]
    divergence: Literal["forward", "reverse", "jeffreys", "jsd"]
    jsd_beta: float
    label_smoothing: float
    update: Literal["simultaneous", "sequential"]
    independent: bool
    optimizer: Literal["sgd", "adam", "adamw", "apex_sgd", "apex_adam", "apex_lamb"]
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    epochs: int
    iterations: int
    schedule: Literal["step", "cosine"]
    lr_drop_every: int
    lr_drops: Sequence[int]
    lr_drop_factor: float
    warmup_epochs: float
    grad_clip: float
    accumulate: int
    ema: float
    device: str
    execution: Literal["auto", "eager", "threads", "streams", "graph", "stacked"]
    threads: int
    amp: Literal["auto", "off", "bf16", "fp16"]
    compile: bool
    profile: bool
    mesh: str
    timeout: float
    max_restarts: int
    sync_batchnorm: bool
    exchange: Literal["logits", "weights"]
    exchange_every: int
    fsdp: bool
    seed: int
    deterministic: bool
    folder: str | os.PathLike | None
    resume: bool
    dry_run: bool
    eval_every: int
    patience: int
    log_every: int
    save_every_steps: int
    save_every_minutes: float
    keep_checkpoints: int
    progress: bool
    tensorboard: bool
    csv: bool
    wandb: bool
    figures: Sequence[Literal["png", "pdf", "svg"]]


class FolderSettings(TrainSettings, total=False):
    size: int
    normalise: Literal["auto", "set", "imagenet"]
    bad_files: Literal["error", "skip"]


class ReidSettings(TrainSettings, total=False):
    recipe: Literal["paper", "strong"]
    standin: bool
    pattern: str
    bad_files: Literal["error", "skip"]
    height: int
    width: int
    images_per_id: int
    erasing: float
    flip_test: bool
    pooling: Literal["avg", "gem"]
    neck: bool
    last_stride: Literal[1, 2]
    kl_sum: bool
    triplet_weight: float
    margin: float | None
    center_weight: float
    circle_weight: float
    distance_mutual_weight: float
