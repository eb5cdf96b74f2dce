"""Small peers, their batches and short runs of them, for the tests of steps."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Ema, Schedule, make_optimizer
from fastdml.engine.amp import resolve_amp
from fastdml.engine.eager import EagerStep
from fastdml.engine.execution import StepOptions
from fastdml.engine.graph import GraphStep
from fastdml.engine.rollback import optimizer_tensors
from fastdml.engine.sequential import SequentialStep
from fastdml.engine.stacked import StackedStep
from fastdml.loss import MutualLoss

C, SIDE, STEPS = 4, 6, 50
CPU = torch.device("cpu")


class DirectCapture:
    """Stands in for a CUDA graph: what it records it calls at once, and again at each replay."""

    def __init__(self, device):
        self.calls = 0

    def warm_up(self):
        return contextlib.nullcontext()

    supervised = warm_up

    def capture(self, run):
        self.run, self.packed = run, run()
        return self.packed

    def replay(self):
        self.calls += 1
        self.packed.copy_(self.run())


def peer(seed: int, width: int = 8) -> nn.Module:
    """Convolution, BatchNorm, dropout and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, groups=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(width, C),
        )


def plain_peer(seed: int, width: int) -> nn.Module:
    """One convolution, BatchNorm and a linear layer; nothing is drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(width, C),
        )  # fmt: skip


def plain_batch(i: int):
    """The i-th, for `plain_peer`."""
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 3, 5, 5, generator=generator)
    return x, torch.randint(C, (8,), generator=generator)


def batches(steps: int, device=CPU, n: int = 16):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        labels = torch.randint(C, (n,), generator=generator)
        x = torch.randn(n, 2, SIDE, SIDE, generator=generator)
        x[:, 0] += labels[:, None, None]  # something to learn
        x = x.to(memory_format=torch.channels_last)
        yield x.to(device), labels.to(device)


class After:
    """Schedule and a sum of losses, as a training run has them."""

    def __init__(self, schedule, K, device):
        self.schedule = schedule
        self.total = torch.zeros(K, device=device)

    def __call__(self, output, update):
        self.schedule.advance(update.skipped)
        self.total += output.losses

    def tensors(self):
        return [*self.schedule.tensors(), self.total]


KINDS = {
    "eager": EagerStep,
    "sequential": SequentialStep,
    "stacked": StackedStep,
    "graph": lambda *a: GraphStep(EagerStep(*a), DirectCapture),
    "sequential graph": lambda *a: GraphStep(SequentialStep(*a), DirectCapture),
    "stacked graph": lambda *a: GraphStep(StackedStep(*a), DirectCapture),
}


class Run:
    """A cohort and its step, with everything that a run adds to it."""

    def __init__(
        self, kind, *, peers=(0, 1), precision="off", optimizer="sgd", rate=0.05, average=None,
        device=CPU, loss=None, make=None, **options,
    ):  # fmt: skip
        torch.manual_seed(5)  # for dropout
        self.cohort = Cohort([peer(k) for k in peers], C).to(device)
        self.cohort.to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.cohort, optimizer, lr=rate, weight_decay=1e-3)
        schedule = Schedule(self.optimizer, torch.linspace(rate, rate / 10, STEPS))
        self.after = After(schedule, len(peers), device)
        self.ema = Ema(self.cohort, average) if average else None
        self.loss = loss or MutualLoss(label_smoothing=0.1)
        self.amp = resolve_amp(precision, device)
        options = StepOptions(ema=self.ema, after=self.after, **options)
        kind = make or KINDS[kind]
        self.step = kind(self.cohort, self.loss, self.optimizer, self.amp, options)

    def train(self, steps=STEPS, **how):
        device = self.amp.device
        self.outputs = [self.step(*batch) for batch in batches(steps, device, **how)]
        return self

    def state(self) -> dict[str, torch.Tensor]:
        names = {f"cohort.{k}": v for k, v in self.cohort.state_dict().items()}
        state = optimizer_tensors(self.optimizer)
        names |= {f"optimizer.{i}": v for i, v in enumerate(state)}
        names |= {f"losses.{i}": o.losses for i, o in enumerate(self.outputs)}
        for field in self.outputs[0].stats._fields:
            names[field] = torch.stack([getattr(o.stats, field) for o in self.outputs])
        names["total"] = self.after.total
        if self.ema:
            names |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        if self.step.update.scaler:
            names |= {"scale": self.step.update.scaler.scale}
        return names


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


CASES = [
    {},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"optimizer": "adam", "rate": 0.005},
    {"optimizer": "adamw", "rate": 0.005, "precision": "fp16", "accumulate": 2},
    {"grad_clip": 0.5, "average": 0.9, "accumulate": 4},
]
