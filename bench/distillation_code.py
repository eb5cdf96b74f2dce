"""The machine code of plain distillation, a student that learns from a teacher and the labels,
beside what else would compute it. Nothing is run, and no GPU is needed.

python -m bench.distillation_code      prints the table

Three ways for sm_90, bf16 logits (N, C), T = 1, a mean and its gradient:

- `register_rows` with K = 2 and one student, as `fastdml.mutual_loss` launches it. It reports the
  teacher's loss too.
- `two_distributions` below: a kernel written for exactly this, compiled and read the same way.
- what torch.compile generates for `formula`, forward and backward, as it would for a GPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from fastdml_kernels import static_report
from fastdml_kernels.machine_code import cuobjdump, parse_sass, usual_path, whole
from fastdml_kernels.options import Options
from fastdml_kernels.row_costs import RowCost, logits_moved
from torch import Tensor
from triton.backends.compiler import GPUTarget

N, SHAPES = 64, (100, 1000)  # rows; classes
BF16 = 2  # bytes
SM_90 = static_report.TARGETS["sm_90"]


class Cost(NamedTuple):
    """Of a way to compute it: launches, bytes of logits and of what is as large as they are, for a
    row; instructions that each warp runs for a row, warps together; registers and barriers."""

    name: str
    launches: int
    row_bytes: float
    instructions: float | None  # None where they are of several kernels
    barriers: float | None
    registers: int | None


@triton.jit
def two_distributions(student, teacher, labels, losses, grad, N, scale,
                      C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Cross-entropy and KL(teacher || student) of each row, and scale times the gradient of their
    sum. Grid: (row blocks,)."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    mask = (n < N)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    z = tl.load(student + at, mask=mask, other=float("-inf"), eviction_policy="evict_first")
    t = tl.load(teacher + at, mask=mask, other=float("-inf"), eviction_policy="evict_first")
    y = tl.load(labels + n, mask=n < N, other=0)
    z = z.to(tl.float32)
    t = t.to(tl.float32)
    z -= tl.max(z, axis=1)[:, None]
    t -= tl.max(t, axis=1)[:, None]
    e_z = tl.exp(z)
    e_t = tl.exp(t)
    sum_z = tl.sum(e_z, axis=1)
    sum_t = tl.sum(e_t, axis=1)
    log_p = z - tl.log(sum_z)[:, None]
    log_q = t - tl.log(sum_t)[:, None]
    p = e_z * (1.0 / sum_z)[:, None]
    q = e_t * (1.0 / sum_t)[:, None]
    is_y = c[None, :] == y[:, None]
    kl = tl.where(q == 0.0, 0.0, q * (log_q - log_p))
    loss = tl.sum(kl - tl.where(is_y, log_p, 0.0), axis=1)
    tl.store(losses + n, loss, mask=n < N)
    g = scale * ((p - q) + (p - tl.where(is_y, 1.0, 0.0)))
    tl.store(grad + at, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def formula(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The same as people write it."""
    log_p = torch.log_softmax(student.float(), dim=1)
    log_q = torch.log_softmax(teacher.float(), dim=1)
    kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return torch.nn.functional.nll_loss(log_p, labels) + kl


def ours(C: int) -> Cost:
    found = static_report.report(2, C, options=Options(students=(0,)))
    assert found.bytes_per_row is not None
    return Cost("register_rows, one student", 1, found.bytes_per_row,
                found.instructions * found.warps, found.barriers, found.registers)  # fmt: skip


def written_for_it(C: int) -> Cost:
    rows, warps = (4, 4) if C <= 128 else (1, 4)  # the tiles of `register_rows`
    half = lambda: torch.empty(N, C, dtype=torch.bfloat16)  # noqa: E731
    block_c = triton.next_power_of_2(C)
    named = {
        "student": half(), "teacher": half(), "labels": torch.zeros(N).long(), "grad": half(),
        "losses": torch.empty(N), "N": N, "scale": 1.0, "C": C, "ROWS": rows, "BLOCK_C": block_c,
    }  # fmt: skip
    compiled = static_report.compile_kernel(two_distributions, named, {"num_warps": warps}, SM_90)
    code = parse_sass(cuobjdump(compiled, "-sass"))
    block = rows * block_c * BF16
    path = usual_path(code, whole(code), logits_moved, (math.inf, math.inf))
    cost = RowCost(path, logits_moved, 32 * warps, (2 * block, block))
    registers = static_report._usage(compiled, code)["registers"]
    return Cost("a kernel written for it", 1, 3 * C * BF16, cost.total(lambda s: 1) / rows * warps,
                cost.total(lambda s: s.is_barrier) / rows, registers)  # fmt: skip


# ---- torch.compile: traced on the CPU, lowered as for an H100. What stands in for the driver and
# the device is what torch's own code generation asks for.

H100 = {
    "multi_processor_count": 132, "major": 9, "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "warp_size": 32,
}  # fmt: skip


def graphs_of(C: int) -> list[tuple[torch.fx.GraphModule, Sequence[Tensor]]]:
    """The forward's graph and the backward's as torch.compile cuts them, with their inputs."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[torch.fx.GraphModule, Sequence[Tensor]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        # what runs is a copy: the graph kept is lowered for another device
        graphs.append((copy.deepcopy(graph), inputs))
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition_fn,
                           decompositions=select_decomp_table)  # fmt: skip
    student, teacher = (torch.randn(N, C).bfloat16() for _ in range(2))
    torch._dynamo.reset()
    loss = torch.compile(formula, backend=backend, dynamic=False)
    loss(student.requires_grad_(), teacher, torch.zeros(N).long()).backward()
    return graphs


@contextmanager
def as_on_an_h100() -> Iterator[None]:
    """For torch's code generation."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties

    known = DeviceProperties(type="cuda", index=0, cc=90, **H100)
    about = SimpleNamespace(name="H100", minor=0, total_memory=80 << 30, L2_cache_size=50 << 20,
                            shared_memory_per_block_optin=232_448, **H100)  # fmt: skip
    values: dict[str, Any] = {
        "get_device_properties": about, "get_compute_capability": 90, "is_available": True,
        "current_device": 0,
    }  # fmt: skip
    stand_ins = {
        name: staticmethod(lambda *_, value=value: value) for name, value in values.items()
    }
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
        )
    )
    with (
        mock.patch.multiple(CudaInterface, **stand_ins),
        mock.patch.object(DeviceProperties, "create", return_value=known),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=about),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        yield


def generated(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """The code that torch.compile writes for a graph on a GPU."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    mode = FakeTensorMode()
    with mode:
        fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                for t in inputs]  # fmt: skip
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        FakeTensorProp(graph, mode).propagate(*fake)
        post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode).propagate(*fake)
        lowered = GraphLowering(graph, shape_env=None)
        with V.set_graph_handler(lowered):
            lowered.run(*fake)
            code, _ = lowered.codegen()
    return code.value


def launches_of(code: str, C: int) -> tuple[int, int]:
    """Launches of generated code, and the bytes of a row that their loads and stores move of logits
    and gradients, which alone are bfloat16 and read class by class, and of float32 like them."""
    size = {"bf16": 2, "fp32": 4}
    launches, total = 0, 0
    for name, kernel in re.findall(r"triton\('(triton_\w+)', '{3}(.*?)'{3}", code, re.DOTALL):
        runs = len(re.findall(rf"\b{name}\.run\(", code))
        types = dict(re.findall(r"'(\w+_ptr\d+)': '\*(\w+)'", kernel))
        moves = re.findall(r"tl\.(?:load|store)\((\w+_ptr\d+) \+ \((.*?)\),", kernel)
        launches += runs
        for pointer, at in moves:
            whole_row = f"{C}*x0" in at or types[pointer] == "bf16"
            if whole_row and "tmp" not in at:
                total += runs * size[types[pointer]] * C
    return launches, total


def compiled_by_torch(C: int) -> Cost:
    graphs = graphs_of(C)
    with as_on_an_h100():
        found = [launches_of(generated(*graph), C) for graph in graphs]
    return Cost("torch.compile", sum(n for n, _ in found), sum(b for _, b in found),
                None, None, None)  # fmt: skip


def table() -> str:
    lines = [f"{'C':>6}  {'':<28}{'launches':>9}{'bytes a row':>12}{'instructions':>14}"
             f"{'barriers':>10}{'registers':>11}"]  # fmt: skip
    for C in SHAPES:
        for cost in (ours(C), written_for_it(C), compiled_by_torch(C)):
            rest = (cost.instructions, cost.barriers, cost.registers)
            shown = ["-" if value is None else f"{value:,.4g}" for value in rest]
            lines.append(f"{C:>6}  {cost.name:<28}{cost.launches:>9}{cost.row_bytes:>12,.0f}"
                         f"{shown[0]:>14}{shown[1]:>10}{shown[2]:>11}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    print(table())
