"""The loss against what people write today, forward alone and forward and backward.

Each contender's losses and gradients are compared with ours before it is timed; one that differs
fails. On CUDA wall time (what the host sees) and kernel time (graph replay, inputs cold in L2 at
large shapes) are apart. Both have the peak memory beyond the logits. What torch.compile makes is
measured after the others, with ours in the same rounds, and its ratio is to that. Quick set on two
CPU cores: about three minutes, most of it torch.compile.

Mutual learning is measured with the default options, distillation (one student, one frozen teacher)
at a temperature and with each divergence.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import timing
from bench.baselines import closed_form, distillation, summed
from bench.conftest import chosen_device
from bench.failures import Failure, in_words, once
from fastdml import MutualLoss, mutual_loss
from fastdml.engine.graph import without_collector
from fastdml.machine import pairwise

SECONDS = 2.0  # of timing for each (shape, direction, clock), all contenders together
COLD_BYTES = 256 << 20  # of inputs that replay walks through: five times an H100's L2
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest loss or gradient


class Case(NamedTuple):
    K: int
    N: int
    C: int
    dtype: str
    divergence: str = ""  # of distillation, by which peer 0 alone learns; else mutual learning

    @property
    def students(self) -> int:
        """The peers that learn; the first ones."""
        return 1 if self.divergence else self.K

    def least_bytes(self, direction: str) -> int:
        """Logits read once, and the students' gradients written once."""
        written = 0 if direction == "forward" else self.students
        return (self.K + written) * self.N * self.C * getattr(torch, self.dtype).itemsize

    def smallest(self) -> Case:
        """For a dry run."""
        return self._replace(N=min(self.N, 4), C=min(self.C, 12))

    def name(self) -> str:
        shape = "x".join(map(str, self[:3]))
        return f"{shape}-distillation-{self.divergence}" if self.divergence else shape


def _cases(dtype: str, *shapes: tuple[int, int, int]) -> list[Case]:
    return [Case(*shape, dtype) for shape in shapes]


def _distillation(dtype: str, *shapes: tuple[int, int], divergence: str = "forward") -> list[Case]:
    return [Case(2, *shape, dtype, divergence) for shape in shapes]


CIFAR = [(K, N, 100) for K, N in product((2, 3, 4, 8), (64, 128, 256, 1024))]
MIDDLE = [(2, 64, 751), (4, 256, 751), (2, 256, 1000), (4, 1024, 1000)]
WIDE = [(2, 128, 21841), (2, 512, 32000), (2, 128, 32768), (2, 64, 128256)]
OTHER_DIVERGENCES = ("reverse", "jeffreys", "jsd")
LARGE = [(4, 8192, 1000), (2, 8192, 16384), (2, 2048, 21841), (2, 4096, 32768), (2, 2048, 128256)]
QUICK = {
    "cpu": _cases(
        "float32", (2, 64, 100), (4, 64, 100), (8, 128, 100), (4, 1024, 1000), (2, 512, 32000)
    )
    + _distillation("float32", (64, 100), (1024, 1000), (512, 32000))
    + [Case(2, 1024, 1000, "float32", divergence) for divergence in OTHER_DIVERGENCES],
    "cuda": [
        *_cases("float32", (2, 64, 100), (8, 128, 100)),
        *_cases("bfloat16", (2, 64, 100), (4, 256, 751), (4, 8192, 1000), (2, 8192, 16384)),
        *_cases("bfloat16", (2, 2048, 128256)),
        *_distillation("float32", (64, 100)),
        *_distillation("bfloat16", (8192, 1000), (2048, 128256)),
        *[Case(2, 8192, 1000, "bfloat16", divergence) for divergence in OTHER_DIVERGENCES],
    ],
}
FULL = {
    "cpu": [
        *_cases("float32", *CIFAR, *MIDDLE, *WIDE),
        *[case for case in QUICK["cpu"] if case.divergence],
    ],
    "cuda": [
        *_cases("float32", *CIFAR, *MIDDLE, *LARGE),
        *_cases("bfloat16", *CIFAR, *MIDDLE, *LARGE),
        *[case for case in QUICK["cuda"] if case.divergence],
    ],
}

Losses = Callable[[Sequence[Tensor], Tensor], Any]
Call = Callable[[Sequence[Tensor], Tensor], Any]
Methods = dict[str, tuple[Losses, Callable]]  # name -> (losses, gradients)


def _methods(case: Case, device: torch.device) -> Methods:
    """name -> (losses, gradients); the optional ones where they are installed, and can run on
    `device`."""
    return _of_distillation(case, device) if case.divergence else _of_mutual_learning(device)


def _of_distillation(case: Case, device: torch.device) -> Methods:
    """Those that compute the student's loss and gradient."""
    ours = partial(mutual_loss, divergence=case.divergence, **distillation.OPTIONS)
    formula = partial(distillation.losses, divergence=case.divergence)
    losses = {"ours": ours, "formula": formula, "formula-c": formula}
    if device.type == "cuda":
        losses["formula-cg"] = formula
        with suppress(ImportError):
            from bench.baselines import liger

            if case.divergence in liger.DIVERGENCES:
                losses["liger"] = partial(liger.distillation, divergence=case.divergence)
    return {name: (function, distillation.gradients) for name, function in losses.items()}


def _of_mutual_learning(device: torch.device) -> Methods:
    methods = {
        "ours": (mutual_loss, summed.gradients),
        "pairwise": (pairwise.losses, pairwise.gradients),
        "summed": (pairwise.losses, summed.gradients),
        "pairwise-c": (pairwise.losses, summed.gradients),
        "closed": (closed_form.losses, summed.gradients),
        "closed-c": (closed_form.losses, summed.gradients),
    }
    with suppress(ImportError):
        from bench.baselines import pytorch_dml

        methods["pydml"] = (pytorch_dml.losses, pytorch_dml.gradients)
    if device.type == "cuda":
        methods["closed-cg"] = methods["closed"]
        with suppress(ImportError):
            from bench.baselines import liger

            methods["liger"] = (liger.losses, summed.gradients)
        with suppress(ImportError):
            from bench.baselines import apex_xentropy

            methods["apex"] = (apex_xentropy.losses, summed.gradients)
    return methods


def _direct(case: Case) -> Call:
    options: dict[str, Any] = {}
    if case.divergence:
        options = {"divergence": case.divergence, **distillation.OPTIONS}
    loss = MutualLoss(**options)
    return lambda logits, labels: loss.value_and_grad(logits, labels)[::2]


def _call(
    name: str, case: Case, direction: str, device: torch.device, backend: str = "inductor"
) -> Call:
    """(logits, labels) -> (losses, gradients), or the losses alone. device: whose contenders are
    meant; backend: of torch.compile."""
    if name == "direct":
        return _direct(case)
    losses, gradients = _methods(case, device)[name]
    if name.endswith("-c"):
        losses = torch.compile(losses, dynamic=False, backend=backend)
    elif name.endswith("-cg"):  # the compiler's own CUDA graphs: fewer launches for the host
        mode = "reduce-overhead" if backend == "inductor" else None
        losses = torch.compile(losses, dynamic=False, backend=backend, mode=mode)

    def forward(logits: Sequence[Tensor], labels: Tensor) -> Any:
        with torch.no_grad():
            return losses(logits, labels)

    def forward_backward(logits: Sequence[Tensor], labels: Tensor) -> Any:
        values = losses(logits, labels)
        return values, gradients(values, logits)

    return forward if direction == "forward" else forward_backward


def _names(case: Case, direction: str, device: torch.device, full: bool) -> list[str]:
    """Contenders of a row, ours first. "direct" takes gradients without autograd, as the training
    step does; "summed" differs from "pairwise" in the backward alone. Compiling a forward for
    itself is left to --full: it would double the quick set's time."""
    names = list(_methods(case, device))
    if case.K > 2 and device.type == "cuda" and not full:
        names.remove("pairwise-c")  # the compiler takes minutes over 8 peers' 56 pairs
    if direction == "forward":
        return [n for n in names if n != "summed" and (full or not _is_compiled(n))]
    return ["ours", "direct", *names[1:]]


def _is_compiled(name: str) -> bool:
    return name.endswith(("-c", "-cg"))


def _groups(names: list[str]) -> list[tuple[str, ...]]:
    """Contenders that take turns: those that torch.compile makes, which takes far longer than to
    measure them, are apart, with ours among them."""
    compiled = tuple(name for name in names if _is_compiled(name))
    others = tuple(name for name in names if not _is_compiled(name))
    return [others, ("ours", *compiled)] if compiled else [others]


def pytest_generate_tests(metafunc):
    device = chosen_device(metafunc.config)
    full = metafunc.config.getoption("--full")
    cases = (FULL if full else QUICK)[device.type]
    clocks = ("wall", "kernel") if device.type == "cuda" else ("wall",)
    values, ids = [], []
    for case, direction in product(cases, ("forward", "forward_backward")):
        if case.divergence and direction == "forward":
            continue  # what is frozen saves nothing there
        for group in _groups(_names(case, direction, device, full)):
            for clock, name in product(clocks, group):
                if name == "ours" and group[1:] and _is_compiled(group[-1]):
                    continue  # measured among the others
                values.append((case, direction, group, clock, name))
                ids.append(f"{device.type}-{case.dtype}-{case.name()}-{direction}-{clock}-{name}")
    metafunc.parametrize(("case", "direction", "group", "clock", "name"), values, ids=ids)


def _inputs(case: Case, device: torch.device, seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    logits = [
        (2 * torch.randn(case.N, case.C, generator=generator, device=device))
        .to(getattr(torch, case.dtype))
        .requires_grad_(k < case.students)
        for k in range(case.K)
    ]
    return logits, torch.randint(case.C, (case.N,), generator=generator, device=device)


def _check(result: Any, ours: Any, case: Case, direction: str) -> None:
    """Raises AssertionError where losses or gradients of those that learn differ."""

    def flat(result: Any) -> list[Tensor]:
        losses, gradients = (result, ()) if direction == "forward" else result
        losses = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        return [losses.detach()[: case.students], *(g for g in gradients if g is not None)]

    tolerance = TOLERANCE[case.dtype]
    for got, expected in zip(flat(result), flat(ours), strict=True):
        error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error <= tolerance, f"differs from ours by {error:.1e} of the largest value"


class Measured(NamedTuple):
    samples: dict[str, dict[str, list[float]]]  # clock -> name -> seconds a call, a round each
    extra_bytes: dict[str, int]
    errors: dict[str, Failure]  # of contenders that failed or differ
    not_captured: dict[str, str]


def _warm(
    call: Call, inputs: tuple, ours: Any, case: Case, direction: str, device: torch.device
) -> timing.Timer:
    """The timer of a contender that has compiled, allocated and recorded graphs of its own, if it
    has any, and whose results are ours."""
    timer = timing.wall(partial(call, *inputs), device)
    with without_collector():
        _check(call(*inputs), ours, case, direction)
        timer(2)
    return timer


class Row(NamedTuple):
    """Contenders that are measured together, and how."""

    case: Case
    direction: str
    names: tuple[str, ...]
    wanted: str  # the kind of device whose contenders and clocks these are
    dry: bool


@once()
def measure(row: Row, device: torch.device) -> Measured:
    """All contenders of a group, interleaved."""
    torch.compiler.reset()  # each shape is compiled for itself
    case, direction = row.case.smallest() if row.dry else row.case, row.direction
    wanted = torch.device(row.wanted)
    logits, labels = _inputs(case, device, seed=0)
    ours = _call("ours", case, direction, wanted)(logits, labels)
    timers, replays, extra, errors, not_captured = {}, {}, {}, {}, {}
    if row.wanted == "cuda":
        pool = None if row.dry else torch.cuda.graph_pool_handle()
        read = case.least_bytes("forward_backward")
        copies = min(timing.CALLS_A_GRAPH, max(1, COLD_BYTES // read))
        inputs = [_inputs(case, device, seed) for seed in range(copies)]
    for name in row.names:
        call = _call(name, case, direction, wanted, "eager" if row.dry else "inductor")
        try:
            timers[name] = _warm(call, (logits, labels), ours, case, direction, device)
        except Exception as error:  # a rival that does not run fails alone
            errors[name] = in_words(error)
            continue
        extra[name] = 0 if row.dry else timing.extra_memory(partial(call, logits, labels), device)
        if row.wanted != "cuda":
            continue
        if name.endswith("-cg"):
            not_captured[name] = "a graph of its own"
            continue
        try:
            calls = [partial(call, *each) for each in inputs]
            replays[name] = timing.device_time(calls, pool, device)
        except RuntimeError as error:
            not_captured[name] = in_words(error).line
    samples = {"wall": timing.interleave(timers, SECONDS)}
    if replays:
        samples["kernel"] = timing.interleave(replays, SECONDS)
    return Measured(samples, extra, errors, not_captured)


def test_loss(case, direction, group, clock, name, device, dry, copy_bandwidth, record, request):
    wanted = chosen_device(request.config).type
    measured = measure(Row(case, direction, group, wanted, dry), device)
    if name in measured.errors:
        measured.errors[name].end_test()
    if clock == "kernel" and name in measured.not_captured:
        pytest.skip(f"not captured in a CUDA graph: {measured.not_captured[name]}")
    samples = measured.samples[clock]
    beside = None
    if _is_compiled(name) and "ours" in samples:
        beside = statistics.median(samples["ours"])
    record(
        samples[name],
        f"loss {wanted} {case.dtype} {case.name()} {direction} {clock}",
        bench="distillation" if case.divergence else "loss",
        **case._asdict(),
        device=wanted,
        direction=direction,
        clock=clock,
        name=name,
        least_bytes=case.least_bytes(direction),
        extra_bytes=measured.extra_bytes.get(name),
        copy_bandwidth=copy_bandwidth,
        ours_beside=beside,
    )
