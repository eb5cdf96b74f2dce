"""No step on a CUDA device mixes devices, copies from one to another, or makes the host wait.

On tensors of `cuda:0` that hold nothing (see `fake_cuda`), in every execution with every option.
What reads the device on purpose is listed at the end.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from covering import Covering
from torch import Tensor, nn

from fastdml.cohort import Cohort
from fastdml.engine import Ema, Schedule, make_optimizer, make_step
from fastdml.engine.execution import EXECUTIONS
from fastdml.engine.graph import GraphStep
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.metrics.classification import Classification
from fastdml.models import ReidHead, create_model
from fastdml.train.meters import Record, Totals
from fastdml.train.predictions import Pictures

from .fake_cuda import CUDA, Device, Offence, device, moved
from .small_runs import SIDE, C, peer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
N = 16
PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {
    "execution": ("eager", "streams", "graph", "stacked"),
    "update": ("simultaneous", "sequential"), "amp": tuple(PRECISIONS),
    "optimizer": ("sgd", "adam", "adamw", "foreach", "plain"), "metric": (False, True),
    "accumulate": (1, 2), "grad_clip": (None, 1.0), "ema": (False, True),
    "after": ("nothing", "a schedule", "a schedule and sums"),
    "target": ("peers", "ensemble", "ensemble_logits"), "detach_targets": (True, False),
    "reduction": ("mean", "sum", "none"), "mimic_ignored": (False, True),
    "kl_weight": ("number", "tensor", "warm-up"), "temperature": (1.0, "tensor"),
    "weights": (False, True), "teachers": (0, 2),
}  # fmt: skip
NEVER = (  # Refused by name, except that sums over an epoch are of one loss a peer, and that
    # torch's SGD that is not fused reads a rate that is a tensor: see below.
    *((("update", "sequential"), ("execution", name)) for name in ("streams", "stacked")),
    (("update", "sequential"), ("accumulate", 2)), (("metric", True), ("accumulate", 2)),
    (("metric", True), ("reduction", "none")),
    (("after", "a schedule and sums"), ("reduction", "none")),
    *((("optimizer", "plain"), ("execution", name)) for name in ("graph", "stacked")),
    *((("optimizer", "plain"), ("after", name)) for name in ("a schedule", "a schedule and sums")),
)  # fmt: skip
CASES = Covering(OPTIONS, never=NEVER).rows()


@pytest.fixture
def cuda():
    with device() as found:
        yield found


def scalar(value: float) -> Tensor:
    return torch.full((), value, device=CUDA)


class Run:
    """A cohort on the fake device and its step, made of the values of `OPTIONS`."""

    def __init__(
        self, cuda: Device, peers: Any = lambda: [peer(0), peer(1)], *, execution="eager",
        update="simultaneous", amp="off", optimizer="sgd", metric=False, accumulate=1,
        grad_clip=None, ema=False, after: Any = "nothing", target="peers", detach_targets=True,
        reduction="mean", mimic_ignored=False, kl_weight="number", temperature=1.0, weights=False,
        teachers=0,
    ):  # fmt: skip
        self.cuda, self.warm_up = cuda, kl_weight == "warm-up"
        head = {"head": ReidHead("gem")} if metric else {}
        self.shape = (N, 3, 32, 32) if metric else (N, 2, SIDE, SIDE)
        with cuda.off():
            nets = [create_model("resnet8", C) if metric else peer(7 + t) for t in range(teachers)]
            self.cohort = Cohort(["resnet8"] * 2 if metric else peers(), C, teachers=nets, **head)
        self.cohort = moved(self.cohort).train()
        for teacher in self.cohort.teachers:
            moved(teacher)
        self.optimizer = self.optimizer_of(optimizer)
        with cuda.answering(False):  # whether an average holds an infinite value
            self.ema = Ema(self.cohort, 0.9) if ema else None
        self.metric = None
        if metric:
            dims = tuple(p.num_features for p in self.cohort.peers)
            every = {"triplet": 1.0, "center": 5e-4, "circle": 1.0, "distance_mutual": 1.0}
            self.metric = moved(MetricLoss(num_classes=C, dims=dims, **every))
        self.loss = MutualLoss(
            target=target, detach_targets=detach_targets, reduction=reduction,
            mimic_ignored=mimic_ignored, kl_weight=scalar(0.5) if kl_weight == "tensor" else 0.5,
            temperature=scalar(2.0) if temperature == "tensor" else temperature,
            peer_weights=torch.empty(2 + teachers, 2 + teachers, device=CUDA) if weights else None,
            class_weight=torch.empty(C, device=CUDA) if weights else None,
        )  # fmt: skip
        self.step = make_step(
            self.cohort, self.loss, self.optimizer, execution=execution, update=update, amp=amp,
            grad_clip=grad_clip, accumulate=accumulate, ema=self.ema, metric=self.metric,
            after=self.after_of(after),
        )  # fmt: skip

    def optimizer_of(self, name: str) -> torch.optim.Optimizer:
        with self.cuda.answering(name != "sgd"):  # whether the rate is below 0, or is not 0 or more
            if name == "foreach":
                groups = [{"params": list(p.parameters())} for p in self.cohort.peers]
                return torch.optim.Adam(groups, scalar(0.1), foreach=True, capturable=True)
            if name == "plain":
                return torch.optim.SGD(self.cohort.parameters(), 0.1, 0.9, foreach=True)
            return make_optimizer(self.cohort, name, lr=0.1, weight_decay=1e-3)

    def after_of(self, after: Any) -> Any:
        if callable(after) or after == "nothing":
            return None if after == "nothing" else Tail(after)
        schedule = Schedule(self.optimizer, torch.empty(9, device=CUDA))
        if after == "a schedule":
            return Tail(lambda output, update: schedule.advance(update.skipped), schedule.tensors)
        names = [teacher.name for teacher in self.cohort.teachers]
        return Record(schedule, Totals(2, CUDA, metric=self.metric is not None, teachers=names))

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.cuda.images(*self.shape), self.cuda.labels(N)

    def train(self, steps: int = 3) -> Any:
        for i in range(steps):
            if self.warm_up:  # as a schedule on the host has it
                self.loss.kl_weight = 0.1 * i
            batch = self.batch()
            with self.cuda.watched():
                output = self.step(*batch)
        return output


class Tail:
    """What runs at the end of a step."""

    def __init__(self, call: Any, tensors: Any = list) -> None:
        self.call, self.tensors = call, tensors

    def __call__(self, *arguments: Any) -> None:
        self.call(*arguments)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i]['execution']}")
def test_no_step_mixes_devices_or_waits(cuda, case):
    options = CASES[case]
    run = Run(cuda, **options)
    output = run.train()
    shape = (2, N) if options["reduction"] == "none" else (2,)
    assert (output.losses.device, output.losses.shape) == (CUDA, shape)
    assert output.stats.packed.device == CUDA
    taught = output.teacher_kl
    assert (taught is None) == (options["teachers"] == 0)
    assert taught is None or (taught.device, taught.shape) == (CUDA, (2, 2))
    assert not any(w.grad is not None for t in run.cohort.teachers for w in t.parameters())
    assert (output.metric is not None) == options["metric"]
    assert cuda.offences == []
    assert PRECISIONS[options["amp"]] in cuda.dtypes
    assert run.step.failure is None
    assert all(w.grad is None for w in run.cohort.parameters())
    assert bool(cuda.kernels) == (options["optimizer"] in ("sgd", "adam", "adamw"))
    if isinstance(run.step, GraphStep):
        assert run.step.captured.replays == 3


def test_the_cases_hold_any_two_options():
    for names in itertools.combinations(OPTIONS, 2):
        excluded = [dict(pair) for pair in NEVER if {n for n, _ in pair} == {*names}]
        met = {tuple(case[n] for n in names) for case in CASES}
        for values in itertools.product(*(OPTIONS[n] for n in names)):
            assert (values in met) != (dict(zip(names, values, strict=True)) in excluded)
    assert {case["execution"] for case in CASES} == {
        e.name for e in EXECUTIONS.values() if "cuda" in e.devices
    }


@pytest.mark.parametrize("amp", PRECISIONS)
def test_what_auto_chooses_waits_no_more_once_it_is_chosen(cuda, amp):
    """While it measures it waits for the device, and nothing else."""
    run = Run(cuda, execution="auto", amp=amp, ema=True, after="a schedule and sums")
    run.step(*run.batch())
    run.train()
    assert run.step.chosen.failure is None
    assert cuda.offences == []
    with pytest.raises(Offence, match=r"torch.cuda.synchronize waits for the device"):
        Run(cuda, execution="auto").train()


def test_a_rate_assigned_as_a_number_goes_to_the_device_alone(cuda):
    run = Run(cuda, execution="graph")
    run.train()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.01
    run.train()
    assert run.step.captured.replays == 6
    assert all(group["lr"].device == CUDA for group in run.optimizer.param_groups)


# ---- it would be seen


class Faulty(nn.Module):
    """A peer that does something on its way."""

    num_classes = C

    def __init__(self, seed: int, does: Any) -> None:
        super().__init__()
        self.inner, self.does = peer(seed), does

    def forward(self, x: Tensor) -> Tensor:
        self.does(x)
        return self.inner(x)


FAULTS = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "if": (lambda x: 1 if (x > 0).any() else 0, "waits"),
    "list": (lambda x: x[0, 0, 0].tolist(), "waits"),
    "index by a mask": (lambda x: x[x > 0], "nonzero"),
    "repeat": (lambda x: x[0, 0, 0].repeat_interleave(x[0, 0, 0].long()), "waits"),
    "equal": (lambda x: torch.equal(x, x), "equal"),
    "to the host": (lambda x: x.to("cpu", non_blocking=True), "copies from"),
    "from the host": (lambda x: torch.tensor([1.0, 2.0], device=CUDA), "copies from"),
    "written from the host": (lambda x: x[0, 0, 0].copy_(torch.zeros(SIDE)), "tensors on"),
    "one of the host": (lambda x: x + torch.zeros(SIDE), "tensors on"),
    "a number of the host": (lambda x: x * torch.zeros(()), "tensors on"),
    "an index of the host": (lambda x: x[torch.arange(2)], "tensors on"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "synchronize waits"),
}


@pytest.mark.parametrize("execution", ["eager", "graph"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step_is_seen(cuda, fault, execution):
    does, message = FAULTS[fault]
    for where in ("peer", "after"):
        if where == "peer":
            run = Run(cuda, lambda: [Faulty(0, does), Faulty(1, does)], execution=execution)
        else:
            images = cuda.images(N, 2, SIDE, SIDE)
            run = Run(cuda, execution=execution, after=lambda *_, images=images: does(images))
        with pytest.raises(Offence, match=message):
            run.train()


def test_tensors_that_the_optimizer_or_the_average_hold_on_the_host_are_seen(cuda):
    run = Run(cuda)
    run.optimizer.param_groups[0]["lr"] = torch.zeros(())
    with pytest.raises(Offence, match="sgd of tensors on"):
        run.train()
    run = Run(cuda, ema=True)
    run.ema.averages[-1] = torch.zeros(run.ema.averages[-1].shape)
    with pytest.raises(Offence, match="tensors on"):
        run.train()


# ---- what reads the device, on purpose


def totals_of(cuda: Device) -> Totals:
    run, totals = Run(cuda), Totals(2, CUDA)
    output = run.train()
    with cuda.watched():
        totals.add(output)
    return totals


def scores_of(cuda: Device, keep: bool = False) -> Classification:
    """keep: also each row's predictions, and the images of most interest."""
    scores, pictures = Classification(2, C, CUDA, keep=keep), Pictures(3)
    with cuda.watched():
        for step in range(2):
            scores.update([torch.empty(N, C, device=CUDA) for _ in range(2)], cuda.labels(N))
            if keep:
                pictures.add(cuda.images(N, 3, SIDE, SIDE), scores.kept[-1], step * N)
    return scores


def scheduled(cuda: Device) -> Run:
    run = Run(cuda, optimizer="plain")
    Schedule(run.optimizer, torch.empty(9, device=CUDA))
    return run


READS = {  # by whoever calls it: between steps, at the end of an epoch, of an evaluation
    "means of the steps": lambda cuda: totals_of(cuda).read,
    "means of the epoch": lambda cuda: totals_of(cuda).epoch,
    "whether a loss is not finite": lambda cuda: totals_of(cuda).bad,
    "scores": lambda cuda: scores_of(cuda).compute,
    "scores beside kept predictions": lambda cuda: scores_of(cuda, keep=True).compute,
    "whether new weights hold infinities": lambda cuda: Run(cuda, ema=True).ema._collect,
    "a rate, by torch's SGD that is not fused": lambda cuda: scheduled(cuda).train,
}


@pytest.mark.parametrize("read", READS)
def test_what_reads_the_device_is_known(cuda, read):
    """All the rest, such as adding to these sums, is watched and does not."""
    call = READS[read](cuda)
    assert cuda.offences == []
    with pytest.raises(Offence, match=r"copies from|waits"), cuda.watched():
        call()
