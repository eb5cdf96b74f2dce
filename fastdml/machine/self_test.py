"""The loss and its gradients on this machine, by each route that it can take here, against float64
by autograd. A few seconds; on a CUDA device a few kernels are compiled, once.

A route: native C code and torch on a CPU, Triton's kernels on a CUDA device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastdml_kernels import cpu_rows
from fastdml_kernels.options import Options
from fastdml_kernels.reference import mutual_loss_reference
from torch import Tensor

from fastdml.loss import mutual_loss

# Largest error of losses and of gradients, relative to the largest of them: a float32 sum over all
# classes, and a gradient rounded to the logits' own type.
LIMITS = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 1e-2),
}


class Case(NamedTuple):
    K: int
    N: int
    C: int
    dtype: torch.dtype
    temperature: float = 1.0
    options: Options = Options()


PLAIN = Options(label_smoothing=0.1)
OTHERS = (Options(divergence="jeffreys"), Options(target="ensemble"), Options(gate="correct"))
# The last ones are taken by other code than the first: torch's by its general form, Triton's by the
# kernels for many classes and for coupled rows.
NATIVE = [
    Case(2, 64, 100, torch.float32),
    Case(3, 33, 1000, torch.bfloat16, 2.0, PLAIN),
    Case(4, 16, 10, torch.float32, 4.0, PLAIN),
]
TORCH = [
    Case(2, 64, 100, torch.float64),
    Case(3, 33, 1000, torch.float64, 2.0, PLAIN),
    *(Case(3, 16, 100, torch.float32, 2.0, options) for options in OTHERS),
]
TRITON = [
    Case(2, 64, 100, torch.float32),
    Case(4, 128, 100, torch.bfloat16, 2.0, PLAIN),
    Case(2, 16, 32_000, torch.float32),
    Case(3, 16, 100, torch.float32, 2.0, OTHERS[0]),
]


def rows(arguments: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """{"native": "built", "absent" or why it does not load}, then one row a route:
    {"route", "errors": by the type of the logits, the largest relative errors of losses and of
    gradients, "right": whether they are within the limits}"""
    yield {"native": native_code()}
    if cpu_rows.library() is not None:
        yield compare("native C", NATIVE, "cpu")
    yield compare("torch", TORCH, "cpu")
    if torch.cuda.is_available():
        yield compare("Triton", TRITON, "cuda")


def native_code() -> str:
    """Whether the loss in C is here: "built", "absent", or the reason why it does not load."""
    if cpu_rows.library() is not None:
        return "built"
    folder = Path(cpu_rows.__file__).parent
    for path in sorted(folder.glob("_cpu_rows*.so")):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return str(error).strip().splitlines()[0]
        return f"{path.name} was built from other code"
    return "absent"


def compare(route: str, cases: Sequence[Case], device: str) -> dict[str, Any]:
    """The largest errors over the cases of each type, and whether all are within the limits."""
    errors: dict[str, list[float]] = {}
    right = True
    for case in cases:
        found = case_errors(case, device)
        name = str(case.dtype).removeprefix("torch.")
        errors[name] = [max(pair) for pair in zip(errors.get(name, [0, 0]), found, strict=True)]
        right &= all(e <= limit for e, limit in zip(found, LIMITS[case.dtype], strict=True))
    return {"route": route, "errors": errors, "right": right}


def case_errors(case: Case, device: str) -> tuple[float, float]:
    """Relative errors of the losses and of the gradients; NaN counts as infinite."""
    draw = torch.Generator().manual_seed(0)
    logits = [
        (3 * torch.randn(case.N, case.C, generator=draw)).to(device, case.dtype).requires_grad_()
        for _ in range(case.K)
    ]
    labels = torch.randint(case.C, (case.N,), generator=draw).to(device)
    exact = [z.detach().double().requires_grad_() for z in logits]
    losses = mutual_loss(logits, labels, temperature=case.temperature, **asdict(case.options))
    expected, _ = mutual_loss_reference(exact, labels, case.options, temperature=case.temperature)
    found_grads = torch.autograd.grad(losses.sum(), logits)
    expected_grads = torch.autograd.grad(expected.sum(), exact)
    return (
        relative_error([losses.detach()], [expected.detach()]),
        relative_error(found_grads, expected_grads),
    )


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    largest = max(float(e.abs().max()) for e in expected)
    error = max(float((f.double() - e).abs().max()) for f, e in zip(found, expected, strict=True))
    return error / largest if error == error else float("inf")
