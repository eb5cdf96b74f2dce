"""A training run's epoch on a CUDA device waits for it where it logs and at its end, not in steps.

On tensors that hold nothing: see `fake_cuda`.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from fastdml.cohort import Cohort
from fastdml.engine.amp import resolve_amp
from fastdml.models import ReidHead
from fastdml.train.evaluations import Evaluations
from fastdml.train.stopping import Stop
from fastdml.train.tasks.task import task_for
from fastdml.train.trainer import Trainer

from .fake_cuda import CUDA, Offence, device, moved
from .small_runs import SIDE, C, peer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
N, STEPS = 16, 11  # more than the clock leaves out
METRIC = {"triplet_weight": 1.0, "center_weight": 0.1, "iterations": 0}


class Loader:
    batch_size = N

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return STEPS

    def epoch(self, epoch, start=0):
        for _ in range(start, STEPS):
            labels = torch.empty(N, dtype=torch.int64, device=CUDA)
            yield torch.empty(N, *self.shape, device=CUDA), labels


@pytest.fixture
def trainer_of(tmp_path):
    """Makes a trainer on the fake device, at its first step, and lists its readings."""

    def make(cuda, data, **changes):
        task = task_for(data)
        with cuda.off():
            if data == "market1501":
                cohort, loader = Cohort(["resnet8"] * 2, C, head=ReidHead()), Loader(3, 16, 8)
            else:
                groups = changes.get("groups", 1)
                peers = [peer(k) for k in range(2 * groups)]
                cohort, loader = Cohort(peers, C, groups=groups), Loader(2, SIDE, SIDE)
        values = {"folder": str(tmp_path), "log_every": 5, "ema": 0.9, "epochs": 2}
        config = task.settings(**{**values, **changes})
        cohort = moved(cohort).train()
        with cuda.answering(config.optimizer != "sgd"):
            trainer = Trainer(
                cohort, loader, Evaluations(None), task, config, tmp_path,
                resolve_amp(config.amp, CUDA), label="mutual",
            )  # fmt: skip
        trainer.ema.infinite = [False] * len(trainer.ema.infinite)
        trainer.bar = SimpleNamespace(update=lambda rows: None)
        trainer.profile = SimpleNamespace(step=lambda: None)
        trainer._costs = lambda batch, choice: ""  # measured before the first step, which waits
        trainer.saved, trainer.reads = time.monotonic(), []
        trainer._read = lambda: trainer.reads.append(trainer.progress.position)
        return trainer

    return make


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("cifar100", {"execution": "eager", "amp": "fp16", "kl_warmup_epochs": 1.0}),
        ("cifar100", {"execution": "graph", "amp": "bf16", "accumulate": 2, "grad_clip": 1.0}),
        ("cifar100", {"execution": "auto", "amp": "bf16", "optimizer": "adamw"}),
        ("cifar100", {"execution": "graph", "groups": 2, "peers": ("a",) * 4}),
        (
            "cifar100",
            {
                "execution": "graph",
                "update": "sequential",
                "amp": "fp16",
                "temperature": 4.0,
                "temperature_schedule": "cosine",
                "temperature_end": 2.0,
            },
        ),
        (
            "market1501",
            {"execution": "streams", "amp": "fp16", **METRIC},
        ),
    ],
    ids=str,
)
def test_an_epoch_waits_where_it_logs_and_at_its_end(trainer_of, data, changes):
    with device() as cuda:
        trainer = trainer_of(cuda, data, **changes)
        trainer._begin = cuda.meant(trainer._begin)  # an execution that is chosen is measured
        trainer.clock.stop = cuda.meant(trainer.clock.stop)  # the end of the epoch
        with cuda.watched():
            trainer._epoch(Stop())
        assert cuda.offences == []
        assert trainer.reads == [5, 10]
        assert trainer.progress.position == STEPS
        assert trainer.clock.images == (STEPS - 10) * N
        assert trainer.step.failure is None


def test_a_reading_in_between_would_be_seen(trainer_of):
    with device() as cuda:
        trainer = trainer_of(cuda, "cifar100", amp="off")
        trainer._begin = cuda.meant(trainer._begin)
        trainer.profile.step = lambda: trainer.totals.bad()
        with pytest.raises(Offence, match="copies from"), cuda.watched():
            trainer._epoch(Stop())
        trainer.clock.skip = 0
        trainer.clock.start()
        with pytest.raises(Offence, match="an event waits"), cuda.watched():
            trainer.clock.stop()
