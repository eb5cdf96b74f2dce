"""What a graph would freeze, found on a CPU.

`TapeCapture` records the operators of one step, as a CUDA graph records kernels, and replays them
on the same memory: Python runs at the capture alone, so a number from the host stays what it was
then. A run of replays equals the eager run bit for bit only where everything that changes from step
to step (batches, choices of the augmentation, rates, scale, weights of the loss, averages, random
masks) is in tensors.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader
from fastdml.data.loaders import resident
from fastdml.engine import Amp, Ema, Schedule, make_optimizer
from fastdml.engine.amp import LossScale
from fastdml.engine.eager import EagerStep
from fastdml.engine.execution import StepOptions
from fastdml.engine.graph import GraphStep
from fastdml.engine.rollback import optimizer_tensors
from fastdml.engine.sequential import SequentialStep
from fastdml.engine.stacked import StackedStep
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.scalar_schedule import ScalarSchedule
from fastdml.train.meters import Record, Totals

C, SIDE, BATCH, CPU = 4, 6, 8, torch.device("cpu")
EPOCHS, STEPS = 3, 4  # of a run


class Tape(TorchDispatchMode):
    recording: Tape | None = None

    def __init__(self):
        super().__init__()
        self.calls, self.paused = [], False

    def __enter__(self):
        Tape.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.recording = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def one_call(function):
    """A kernel of ours: what it does inside is no operator of torch's."""

    def call(*args, **kwargs):
        tape = Tape.recording
        if tape is None:
            return function(*args, **kwargs)
        tape.paused = True
        out = function(*args, **kwargs)
        tape.paused = False
        tape.calls.append((function, args, kwargs, out))
        return out

    return call


class Loss(MutualLoss):
    def value_and_grad(self, logits, labels):
        as_it_is = copy.copy(self)  # a launch takes numbers as they are, tensors by their address
        return one_call(partial(MutualLoss.value_and_grad, as_it_is))(logits, labels)


class TapeCapture:
    """As `graph.CudaCapture`."""

    def __init__(self, device):
        self.tape = Tape()

    def warm_up(self):
        return contextlib.nullcontext()

    supervised = warm_up

    def capture(self, run):
        with self.tape:
            return run()

    @torch.no_grad()
    def replay(self):
        self.tape.replay()


class Peer(nn.Module):
    num_classes = C

    def __init__(self, seed):
        super().__init__()
        self.num_features = 8
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.25),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )  # fmt: skip
            self.head = nn.Linear(8, C)

    def logits_and_features(self, x):
        features = self.body(x)
        return self.head(features), features

    def forward(self, x):
        return self.logits_and_features(x)[0]


class After:
    """The end of a step in a run: schedule and sums."""

    def __init__(self, schedule):
        self.schedule, self.total = schedule, torch.zeros(2)

    def __call__(self, output, update):
        self.schedule.advance(update.skipped)
        self.total += output.losses

    def tensors(self):
        return [*self.schedule.tensors(), self.total]


def loader():
    generator = torch.Generator().manual_seed(3)
    n = BATCH * STEPS
    pixels = torch.randint(256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(C, (n,), generator=generator)
    images = ImageSet(pixels, labels, C, tuple("abcd"), mean=(128.0,) * 3, std=(64.0,) * 3)
    return ResidentLoader(images, BATCH, seed=7, train=True, pad=1, erase=0.5)


KNOWN = torch.linspace(-2, 2, BATCH * STEPS * C).view(-1, C).sin()  # a teacher's logits
KINDS = {"eager": EagerStep, "sequential": SequentialStep, "stacked": StackedStep}


def train(
    kind, graph, *, optimizer="sgd", scale=0.0, metric=False, after=After, epochs=EPOCHS,
    teachers=(), known=False, **options,
):  # fmt: skip
    """Everything that the epochs leave behind. known: the teacher's logits, from the numbers of the
    images."""
    torch.manual_seed(5)
    cohort = Cohort([Peer(0), Peer(1)], C, teachers=[Peer(seed) for seed in teachers])
    cohort.to(memory_format=torch.channels_last).train()
    made = make_optimizer(cohort, optimizer, lr=0.05, weight_decay=1e-3)
    schedule = Schedule(made, torch.linspace(0.05, 0.005, EPOCHS * STEPS))
    scaler = LossScale(CPU, init=scale) if scale else None
    precision = Amp(CPU, torch.float16 if scale else None, scaler)
    ema, end = Ema(cohort, 0.9), after(schedule)
    data, loss = loader(), Loss(label_smoothing=0.1)
    centres = MetricLoss(num_classes=C, dims=(8, 8), triplet=1.0, center=0.1) if metric else None
    if known:
        options["taught"] = lambda samples: [KNOWN.index_select(0, samples)]
    options = StepOptions(ema=ema, after=end, metric=centres, assemble=data.assemble, **options)
    step = KINDS[kind](cohort, loss, made, precision, options)
    if graph:
        step = GraphStep(step, TapeCapture)
    losses = []
    for epoch in range(epochs):
        loss.kl_weight, loss.temperature = 0.5 * (epoch + 1), torch.tensor(1.0 + epoch)
        for i in range(STEPS):
            key = [data.samples(epoch, i)] if known else []
            losses.append(step(*data.index(epoch, i), *key).losses)
    assert not graph or (step.failure is None and step.captured.tape.calls)
    found = {**cohort.state_dict(), "losses": torch.stack(losses), "updates": schedule.updates}
    tensors = [*optimizer_tensors(made), *ema.averages, *end.tensors(), torch.get_rng_state()]
    tensors += scaler.tensors() if scaler else []
    tensors += centres.tensors() if metric else []
    return found | {str(i): t for i, t in enumerate(tensors)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CASES = [
    ("eager", {"grad_clip": 0.5}),
    ("eager", {"optimizer": "adam", "scale": 2.0**20, "accumulate": 2}),  # overflows at first
    ("eager", {"optimizer": "adamw", "metric": True}),
    ("sequential", {"scale": 2.0**20}),
    ("stacked", {"metric": True}),
    ("eager", {"teachers": (7, 8), "metric": True}),
    ("stacked", {"teachers": (7,), "known": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_replays_are_eager_steps_bit_for_bit(kind, options):
    expected = train(kind, False, **options)
    assert_same(train(kind, True, **options), expected)
    assert expected["losses"].isfinite().all()
    assert (0 < expected["updates"] < EPOCHS * STEPS) == ("scale" in options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs under the interpreter")
def test_the_augmentation_kernel_takes_its_epoch_from_the_device(monkeypatch):
    from fastdml_kernels import augment

    expected = train("eager", False, epochs=2)
    monkeypatch.setattr(resident, "has_kernel", lambda device: True)
    monkeypatch.setattr(augment, "augment", one_call(augment.augment))
    assert [t.shape for t in loader().index(1, 2)] == [(1,), (BATCH,)]
    assert_same(train("eager", True, epochs=2), expected)


def test_what_a_run_does_after_a_step_moves_the_losss_schedules_on_the_tape():
    """Temperature and weight change at every step; one capture serves them all."""

    def run(graph):
        cohort = Cohort([Peer(0), Peer(1)], C, teachers=[Peer(7)]).eval()  # draws nothing
        made = make_optimizer(cohort, "sgd", lr=0.05)
        rates = Schedule(made, torch.linspace(0.05, 0.005, EPOCHS * STEPS))
        of_loss = {
            "temperature": ScalarSchedule(4.0, 1.5, steps=EPOCHS * STEPS, kind="cosine"),
            "kl_weight": ScalarSchedule(1.0, 2.0, steps=EPOCHS * STEPS, warmup=STEPS),
        }
        loss = Loss(**{name: one.value for name, one in of_loss.items()})
        record = Record(rates, Totals(2, CPU, teachers=["t"]), [*of_loss.values()])
        data = loader()
        options = StepOptions(after=record, assemble=data.assemble)
        step = EagerStep(cohort, loss, made, Amp(CPU, None, None), options)
        step = GraphStep(step, TapeCapture) if graph else step
        seen, first = [], None
        for epoch in range(EPOCHS):
            for i in range(STEPS):
                seen.append(torch.stack([loss.temperature, loss.kl_weight]))
                losses = step(*data.index(epoch, i)).losses
                first = first or (graph and step.captured)
                seen.append(losses)
        assert not graph or (step.failure is None and step.captured is first)
        return torch.stack(seen[::2]), torch.stack(seen[1::2]), record.totals.sums

    values, losses, sums = run(graph=False)
    assert len(values.unique(dim=0)) == EPOCHS * STEPS
    for found, expected in zip(run(graph=True), (values, losses, sums), strict=True):
        assert torch.equal(found, expected)


def test_the_tape_would_find_a_number_from_the_host():
    class Counts(After):
        steps = 0

        def __call__(self, output, update):
            super().__call__(output, update)
            self.steps += 1
            self.total += self.steps

    found, expected = (train("eager", graph, after=Counts) for graph in (True, False))
    assert any(not torch.equal(found[name], value) for name, value in expected.items())
