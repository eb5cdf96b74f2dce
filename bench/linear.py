"""`linear_mutual_loss` on the CPU beside what it replaces: time, peak memory of both passes.

python -m bench.linear [--shape N D C] [--compiled] [--json FILE]      prints the table
python -m bench.linear --table FILE                                    prints a stored one

Two tasks on (N, D) hidden states and (C, D) output embeddings in float32: two peers that teach
each other, and one student of a frozen teacher. Contenders: ours; the linear layers and then
`mutual_loss`; the layers and then the usual formula of cross_entropy and kl_div; Liger's
LigerFusedLinearJSDLoss (student and teacher, chunks of its own; --compiled also as torch.compile
makes it, which takes a C++ compiler and a minute). Their gradients are compared with ours before
anything is timed.

Time: the process's on one thread, which other processes hardly change, the least of the rounds,
in which contenders take turns. Memory: of a fresh process each, whose peak (VmHWM) is reset when
inputs are made and the contender has run once on a small problem; gradients are part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from fastdml import linear_mutual_loss, mutual_loss

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2048, 256, 32000)  # N, D, C
SMALL = (64, 8, 128)
ROUNDS = 5
TOLERANCE = 1e-4  # of the largest gradient


class Problem(NamedTuple):
    hidden: list[Tensor]  # 2 of (N, D)
    weight: list[Tensor]  # 2 of (C, D)
    labels: Tensor  # (N,)

    @classmethod
    def of(cls, shape: tuple[int, int, int], frozen: bool) -> Problem:
        """frozen: the second peer is a teacher without gradients."""
        N, D, C = shape
        g = torch.Generator().manual_seed(0)
        hidden = [torch.randn(N, D, generator=g) for _ in range(2)]
        weight = [torch.randn(C, D, generator=g) / D**0.5 for _ in range(2)]
        for t in (hidden[0], weight[0]) if frozen else (*hidden, *weight):
            t.requires_grad_()
        return cls(hidden, weight, torch.randint(C, (N,), generator=g))

    def logits(self) -> list[Tensor]:
        return [F.linear(h, w) for h, w in zip(self.hidden, self.weight, strict=True)]


def _ours(p: Problem) -> Tensor:
    losses = linear_mutual_loss(p.hidden, p.weight, p.labels)
    return losses.sum() if p.hidden[1].requires_grad else losses[0]


def _layers_and_mutual_loss(p: Problem) -> Tensor:
    losses = mutual_loss(p.logits(), p.labels)
    return losses.sum() if p.hidden[1].requires_grad else losses[0]


def _layers_and_formula(p: Problem) -> Tensor:
    z = p.logits()
    total = torch.zeros(())
    for own, other in (z, z[::-1]) if p.hidden[1].requires_grad else (z,):
        log_q, log_t = F.log_softmax(own, 1), F.log_softmax(other.detach(), 1)
        kl = F.kl_div(log_q, log_t, reduction="batchmean", log_target=True)
        total = total + F.cross_entropy(own, p.labels) + kl
    return total


def _liger(compiled: bool) -> Callable[[Problem], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1.0, 1.0, beta=0.0, compiled=compiled)
    return lambda p: loss(p.hidden[0], p.weight[0], p.hidden[1], p.weight[1], p.labels)


def contenders(frozen: bool, compiled: bool) -> dict[str, Callable[[Problem], Tensor]]:
    """A function from a problem to the loss, by name; Liger's where it is installed."""
    found = {
        "ours": _ours,
        "layers, mutual_loss": _layers_and_mutual_loss,
        "layers, formula": _layers_and_formula,
    }
    if frozen:
        try:
            found["Liger's fused JSD"] = _liger(False)
            if compiled:
                found["Liger's, compiled"] = _liger(True)
        except ImportError:
            pass
    return found


def gradients(loss: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, ...]:
    leaves = [t for t in (*problem.hidden, *problem.weight) if t.requires_grad]
    return torch.autograd.grad(loss(problem), leaves)


def times(shape: tuple[int, int, int], frozen: bool, compiled: bool) -> dict[str, float]:
    """Seconds of forward and backward by contender."""
    problem, least = Problem.of(shape, frozen), {}
    losses = contenders(frozen, compiled)
    ours = gradients(losses["ours"], problem)
    for name, loss in losses.items():
        for got, expected in zip(gradients(loss, problem), ours, strict=True):
            error = (got - expected).abs().max() / expected.abs().max()
            if not error < TOLERANCE:
                raise AssertionError(f"{name} differs from ours by {error:.1e} of the largest")
        least[name] = float("inf")
    for _ in range(ROUNDS):
        for name, loss in losses.items():
            start = time.process_time()
            gradients(loss, problem)
            least[name] = min(least[name], time.process_time() - start)
    return least


def extra_bytes(name: str, shape: tuple[int, int, int], frozen: bool) -> int:
    """The peak of this process beyond what it held before the call, in bytes. Linux, glibc."""
    loss = contenders(frozen, compiled="compiled" in name)[name]
    gradients(loss, Problem.of(SMALL, frozen))
    problem = Problem.of(shape, frozen)
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would be used and not counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    gradients(loss, problem)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return 1024 * int(line.split()[1])


def _in_process(function: str, *arguments: Any) -> Any:
    """What a function of this module returns in a process of its own."""
    code = (
        "import json, torch; from bench import linear; torch.set_num_threads(1); "
        f"print(json.dumps(linear.{function}(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: tuple[int, int, int], compiled: bool) -> list[dict[str, Any]]:
    """A row for each task and contender."""
    rows = []
    for frozen in (False, True):
        seconds = _in_process("times", shape, frozen, compiled)
        for name, least in seconds.items():
            extra = _in_process("extra_bytes", name, shape, frozen)
            rows.append({"frozen": frozen, "name": name, "seconds": least, "extra_bytes": extra})
    return rows


def table(rows: list[dict[str, Any]], shape: tuple[int, int, int], where: str) -> str:
    """The table, under the line that says where it was measured."""
    N, D, C = shape
    lines = [where]
    for frozen, title in ((False, "two peers"), (True, "a student, a frozen teacher")):
        lines += ["", f"{title}: N = {N}, D = {D}, C = {C}, float32, one thread"]
        lines += [f"{'':<24}{'seconds':>9}{'x ours':>8}{'MiB':>9}{'x ours':>8}"]
        chosen = [row for row in rows if row["frozen"] == frozen]
        ours = chosen[0]
        for row in chosen:
            slower = row["seconds"] / ours["seconds"]
            larger = row["extra_bytes"] / ours["extra_bytes"]
            lines.append(
                f"{row['name']:<24}{row['seconds']:>9.3f}{slower:>8.2f}"
                f"{row['extra_bytes'] / 2**20:>9.0f}{larger:>8.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("N", "D", "C"))
    parser.add_argument("--compiled", action="store_true", help="Liger's under torch.compile too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--table", type=Path, help="file of figures to print, nothing is measured")
    chosen = parser.parse_args()
    report.check_writable(parser, chosen.json)
    if chosen.table:
        found = json.loads(chosen.table.read_text())
    else:
        rows = measure(tuple(chosen.shape), chosen.compiled)
        where = report.machine(torch.device("cpu"))
        found = {"rows": rows, "shape": chosen.shape, "where": where}
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(**found))


if __name__ == "__main__":
    main()
