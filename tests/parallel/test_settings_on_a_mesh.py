"""Each setting with a value other than its default: on a mesh of two peers or two columns a run is
that of one process, or every rank refuses it in the same line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from whole_runs import Run, assert_same, on_digits, trained

from fastdml.errors import InputError
from fastdml.parallel import RankLost
from fastdml.parallel.failure import line_of
from fastdml.train import TrainConfig

pytestmark = pytest.mark.usefixtures("_own_scans")

# What differs on purpose between the two runs, or is no matter of a run that is not killed.
APART = {
    "mesh", "timeout", "max_restarts", "sync_batchnorm", "exchange", "exchange_every", "fsdp",
    "folder", "resume", "dry_run", "data", "root", "download", "keep_checkpoints", "device",
    "wandb",  # which needs a key
}  # fmt: skip
EAGER = "does not go with a mesh on cpu: use eager"
REFUSED = {
    "update": "sequential",
    "optimizer, apex": "needs NVIDIA Apex",
    "execution": EAGER,
    "execution, streams": EAGER,
    "execution, graph": EAGER,
    "execution, stacked": EAGER,
    "compile": "compile does not go with a mesh: leave it out",
    "cache_teachers": "cache_teachers does not go with a mesh",
    "groups": "the groups share one device",
    "unlabelled": "give labelled to drop labels of the set itself",
    "teachers": "teacher no-such-folder: there is no no-such-folder",
    "pretrained": "has no pretrained weights",
}
ARRAYS: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 6},
    "groups": {"groups": 2},
    "temperature": {"temperature": 3.0},
    "temperature_schedule": {"temperature_schedule": "linear", "temperature_end": 3.0},
    "temperature_end": {"temperature_schedule": "cosine", "temperature_end": 3.0},
    "temperature_warmup_epochs": {
        "temperature_schedule": "linear", "temperature_end": 3.0, "temperature_warmup_epochs": 1.5,
    },
    "ce_weight": {"ce_weight": 0.5},
    "kl_weight": {"kl_weight": 0.5},
    "kl_schedule": {"kl_schedule": "linear", "kl_weight_end": 0.1},
    "kl_weight_end": {"kl_schedule": "cosine", "kl_weight_end": 0.1},
    "kl_warmup_epochs": {"kl_warmup_epochs": 2.0},
    "target": {"target": "ensemble"},
    "target, logits": {"target": "ensemble_logits"},
    "gate": {"gate": "correct"},
    "gate, best": {"gate": "best"},
    "gate, confidence": {"gate": "confidence"},
    "gate, entropy": {"gate": "entropy"},
    "divergence": {"divergence": "reverse"},
    "divergence, jeffreys": {"divergence": "jeffreys"},
    "jsd_beta": {"divergence": "jsd", "jsd_beta": 0.3},
    "label_smoothing": {"label_smoothing": 0.1},
    "update": {"update": "sequential"},
    "independent": {"independent": True},
    "optimizer": {"optimizer": "adam", "lr": 0.01},
    "optimizer, adamw": {"optimizer": "adamw", "lr": 0.01},
    "optimizer, apex": {"optimizer": "apex_sgd"},
    "lr": {"lr": 0.2},
    "momentum": {"momentum": 0.0, "nesterov": False},
    "nesterov": {"nesterov": False},
    "weight_decay": {"weight_decay": 0.1},
    "epochs": {"epochs": 2},
    "iterations": {"epochs": 0, "iterations": 15},
    "schedule": {"schedule": "cosine"},
    "lr_drop_every": {"lr_drop_every": 2, "lr_drops": ()},
    "lr_drops": {"lr_drops": (1, 3), "lr_drop_every": 0},
    "lr_drop_factor": {"lr_drops": (1, 3), "lr_drop_every": 0, "lr_drop_factor": 0.5},
    "warmup_epochs": {"warmup_epochs": 1.5},
    "grad_clip": {"grad_clip": 0.05},
    "accumulate": {"accumulate": 2},
    "ema": {"ema": 0.9},
    "execution": {"execution": "threads"},
    "execution, streams": {"execution": "streams"},
    "execution, graph": {"execution": "graph"},
    "execution, stacked": {"execution": "stacked"},
    "threads": {"threads": 2},
    "amp": {"amp": "fp16"},
    "compile": {"compile": True},
    "profile": {"profile": True, "batch_size": 2},
    "seed": {"seed": 5},
    "deterministic": {"deterministic": True},
    "eval_every": {"eval_every": 2},
    "patience": {"patience": 1, "validation_data": True, "eval_every": 1, "lr": 1.0},
    "log_every": {"log_every": 1},
    "save_every_steps": {"save_every_steps": 4},
    "save_every_minutes": {"save_every_minutes": 1e-6},
    "progress": {"progress": True},
    "tensorboard": {"tensorboard": True},
    "csv": {"csv": True},
    "figures": {"figures": ("pdf",)},
    "cache_teachers": {"teacher": True, "cache_teachers": True},
    "unlabelled_share": {"unlabelled": True, "unlabelled_share": 0.5},
}  # fmt: skip
DIGITS: dict[str, dict[str, Any]] = {
    "subset": {"subset": 64},
    "validation": {"validation": 0.25},
    "labelled": {"labelled": 20},
    "unlabelled": {"unlabelled": "no-such-folder"},
    "pad": {"pad": 2},
    "flip": {"flip": False},
    "augment": {"augment": "none"},
    "augment, trivial": {"augment": "trivial"},
    "augment, rand": {"augment": "rand"},
    "loader": {"loader": "torch"},
    "loader, resident": {"loader": "resident"},
    "loader, dali": {"loader": "dali"},
    "peers": {"peers": ("resnet8", "mobilenet", "resnet8")},
    "teachers": {"teachers": ("no-such-folder",)},
    "pretrained": {"pretrained": True},
}


def outcome(run: Any, mesh: str, folder: Path, **changes: Any) -> Run | str:
    try:
        return run(mesh, folder, **changes)
    except (InputError, RankLost) as error:
        return line_of(error)


def all_of(mesh: str, folder: str, run: Any, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The run of each case, or the line that refuses it."""
    return {name: outcome(run, mesh, Path(folder, name), **cases[name]) for name in cases}


def test_every_setting_is_tried():
    tried = {name.partition(",")[0] for name in (*ARRAYS, *DIGITS)}
    assert tried == {field.name for field in dataclasses.fields(TrainConfig)} - APART


def compare(folder: Path, mesh: str, run: Any, cases: dict[str, Any], **near: float) -> None:
    """near: of `assert_same`."""
    parts = 2 if mesh == "data=2" else 1
    alone = {
        name: {**changes, "accumulate": parts * changes.get("accumulate", 1)}
        for name, changes in cases.items()
        if name not in REFUSED
    }
    ranks = run_ranks(2, all_of, mesh, str(folder / "ranks"), run, cases, timeout=900)
    one = all_of("peer=1", str(folder / "alone"), run, alone)
    wrong = []
    for name in cases:
        first, second = (found[name] for found in ranks)
        if name in REFUSED:
            if first != second or REFUSED[name] not in str(first):
                wrong.append(f"{name}: {first} / {second}")
            continue
        try:
            assert_same(first, one[name], statistics=parts == 1, **near)
            assert second.result.scores == first.result.scores
        except (AssertionError, AttributeError) as error:
            wrong.append(f"{name}: {error}: {first if isinstance(first, str) else ''}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["peer=2", "data=2"])
def test_settings_of_training(tmp_path, mesh):
    compare(tmp_path, mesh, trained, ARRAYS, metrics=1e-6, weights=1e-9)


@pytest.mark.slow
def test_settings_of_images(tmp_path):
    cases = {name: {"epochs": 2, **changes} for name, changes in DIGITS.items()}
    compare(tmp_path, "peer=2", on_digits, cases, metrics=1e-3, weights=1e-3)
