"""Training steps: the loops people write, pytorch-dml's trainer, and ours in every execution.

All contenders train the same peers from the same weights on the same batches, resident in memory,
with the same SGD; their first losses are compared before they are timed. channels_last (nhwc) and
mixed precision are shown with and without, so that the source of a gain can be seen; mixed
precision is measured where the processor computes in it: emulated it is many times slower. "auto"
is shown with what it chose. Quick set on two CPU cores: half a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import timing
from bench.baselines import summed
from bench.conftest import chosen_device, is_dry
from bench.failures import Failure, in_words, once
from fastdml import Cohort, MutualLoss
from fastdml.engine import executions, make_optimizer, make_step
from fastdml.engine.amp import resolve_amp
from fastdml.errors import InputError
from fastdml.machine import pairwise

SECONDS = {"cpu": 10.0, "cuda": 6.0}  # of timing a case, all contenders together
STEPS = {"cpu": 2, "cuda": 10}  # a sample
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
CLASSES = 100
TOLERANCE = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 5e-2}  # of the first loss; fp32 may be TF32
MIXED = ("resnet32", "mobilenet", "wrn_16_4")

Batches = list[tuple[Tensor, Tensor]]
Epoch = Callable[[Batches], list[float]]  # trains on the batches; the peers' losses on the last


class Case(NamedTuple):
    peers: tuple[str, ...]
    batch: int
    side: int = 32  # of the images

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(self.peers))
        return " + ".join(f"{self.peers.count(kind)} {kind}" for kind in kinds)

    def smallest(self) -> Case:
        """For a dry run."""
        return Case(("resnet8",) * len(self.peers), 2, 8)


QUICK = {
    "cpu": [Case(("resnet32",) * 2, 64)],
    "cuda": [Case(("resnet32",) * K, 64) for K in (2, 1, 4)],
}
FULL = [
    *(Case(("resnet32",) * K, 64) for K in (1, 2, 3, 4, 8)),
    *(Case(("resnet32",) * 2, batch) for batch in (128, 512)),
    *(
        Case((name,) * 2, batch)
        for name, batch in product(
            ("wrn_16_4", "wrn_28_10", "mobilenet", "googlenet"), (64, 128, 512)
        )
    ),
    *(Case(MIXED, batch) for batch in (64, 128, 512)),
]


def _sgd(parameters: list[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **SETTINGS)


def _names(case: Case, device: torch.device, dry: bool = False) -> list[str]:
    """Contenders; the eager step in both memory formats, the others in the one for speed. Of a
    device that is not there, in a dry run, those of one with bf16."""
    native = "bf16" if dry and device.type == "cuda" else resolve_amp("auto", device).name
    precisions = ["fp32"] if native == "fp32" else ["fp32", native]
    names = ["pairwise", "summed"]
    if native == "bf16":
        names.append("pairwise bf16 nhwc")
    if len(case.peers) > 1:
        names.append("pytorch-dml")
    for execution, precision in product(executions(device), precisions):
        formats = ("nchw", "nhwc") if execution == "eager" else ("nhwc",)
        names += [f"ours {execution} {precision} {each}" for each in formats]
    return [*names, f"ours auto {precisions[-1]} nhwc"]


def _epoch(name: str, case: Case, device: torch.device) -> tuple[Epoch, Any]:
    """Builds the contender: its own peers, always from the same weights; and our step."""
    cohort = Cohort(case.peers, CLASSES, seed=0).to(device).train()
    if name.endswith("nhwc"):
        cohort.to(memory_format=torch.channels_last)
    if name == "pytorch-dml":
        from bench.baselines import pytorch_dml

        return pytorch_dml.Loop(list(cohort.peers), _sgd, device).epoch, None
    if name.startswith("ours"):
        _, execution, precision, _ = name.split()
        optimizer = make_optimizer(cohort, "sgd", **SETTINGS)
        step = make_step(
            cohort, MutualLoss(), optimizer, execution=execution,
            amp="off" if precision == "fp32" else precision,
        )  # fmt: skip
        return lambda batches: [step(*batch).losses for batch in batches][-1].tolist(), step
    if name == "summed":
        loop = summed.Loop(cohort.peers, _sgd)
    else:
        loop = pairwise.Loop(cohort.peers, _sgd, torch.bfloat16 if "bf16" in name else None)
    return lambda batches: [loop(*batch) for batch in batches][-1], None


def _batches(case: Case, device: torch.device) -> tuple[Batches, Batches]:
    """The same batches in both memory formats."""
    generator = torch.Generator(device).manual_seed(0)
    steps = STEPS[device.type]
    made = [
        (
            torch.randn(case.batch, 3, case.side, case.side, generator=generator, device=device),
            torch.randint(CLASSES, (case.batch,), generator=generator, device=device),
        )
        for _ in range(min(steps, 4))
    ]
    made = (made * steps)[:steps]
    return made, [(x.contiguous(memory_format=torch.channels_last), y) for x, y in made]


def pytest_generate_tests(metafunc):
    device = chosen_device(metafunc.config)
    cases = FULL if metafunc.config.getoption("--full") else QUICK[device.type]
    names = partial(_names, device=device, dry=is_dry(metafunc.config))
    values = [(case, name) for case in cases for name in names(case)]
    ids = [
        f"{device.type}-{case}-{case.batch}-{name}".replace(" + ", "+").replace(" ", "_")
        for case, name in values
    ]
    metafunc.parametrize(("case", "name"), values, ids=ids)


class Measured(NamedTuple):
    samples: dict[str, list[float]]  # seconds a step
    errors: dict[str, Failure]
    chosen: str  # by "auto"


def _warm(
    name: str, case: Case, device: torch.device, batches: Batches, expected: Tensor
) -> tuple[timing.Timer, Any]:
    """The timer of a contender that has trained on the batches once, and our step."""
    epoch, step = _epoch(name, case, device)
    _check(name, epoch(batches[:1]), expected)
    epoch(batches)
    return timing.wall(lambda: epoch(batches), device), step


@once()
def measure(case: Case, names: tuple[str, ...], device: torch.device) -> Measured:
    """All contenders of one case, interleaved."""
    nchw, nhwc = _batches(case, device)
    timers, errors, chosen = {}, {}, ""
    expected = torch.tensor(_epoch("pairwise", case, device)[0](nchw[:1]))
    for name in names:
        batches = nhwc if name.endswith("nhwc") else nchw
        try:
            timers[name], step = _warm(name, case, device, batches, expected)
        except Exception as error:  # a contender that does not run fails alone
            errors[name] = in_words(error)
            continue
        if "auto" in name:
            chosen = step.name
    samples = timing.interleave(timers, SECONDS[device.type], fewest=3, most=30)
    samples = {n: [s / len(nchw) for s in each] for n, each in samples.items()}
    return Measured(samples, errors, chosen)


def _check(name: str, losses: list[float] | float, expected: Tensor) -> None:
    """Raises AssertionError where the first losses are not the pairwise loop's."""
    precision = next((p for p in ("bf16", "fp16") if p in name), "fp32")
    if name == "summed":
        expected = expected.sum()
    error = ((torch.tensor(losses) - expected).abs() / expected).max()
    assert error <= TOLERANCE[precision], f"the first losses differ by {error:.1e}: {losses}"


def test_step(case, name, device, dry, record, request):
    wanted = chosen_device(request.config)
    names = tuple(_names(case, wanted, dry))
    measured = measure(case.smallest() if dry else case, names, device)
    if name in measured.errors:
        # not installed, an execution that is not for this case, or a device too small
        measured.errors[name].end_test(ImportError, InputError, torch.OutOfMemoryError)
    record(
        measured.samples[name],
        f"step {wanted.type} {case} batch {case.batch}",
        bench="step",
        name=name.replace("auto", f"auto ({measured.chosen})"),
        device=wanted.type,
        peers=str(case),
        batch=case.batch,
    )
