"""How long ranks wait for each other's logits in a step, over a link that is late.

python -m bench.mesh_pipeline [--delays 0 5 10 20 40] [--forward 20] [--json FILE]
python -m bench.mesh_pipeline --table FILE         prints a stored one

Two ranks on gloo with one peer each, whose forward pass sleeps for a time and whose backward pass
for twice that, so that other processes on the machine change little. Every broadcast arrives later
by a delay, as over a long or narrow link. A batch is computed at once, or in 2 or 4 parts, whose
logits travel while the next part runs forward; receptions are posted before the forward passes, as
on gloo, or in rounds, as on NCCL. Printed is the time that a step waits for logits, and beside it
what the order of the passes leaves of the delay: nothing, in parts, while it is shorter than a
part's forward pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bench import report
from fastdml import Cohort, MutualLoss
from fastdml.engine import make_optimizer, make_step
from fastdml.parallel import make_mesh
from fastdml.parallel.exchange import Transfer

WARM, STEPS, BATCH, CLASSES = 3, 15, 64, 100


class Sleep(torch.autograd.Function):
    """Takes `seconds` forward and twice that backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


class Sleeper(nn.Module):
    """A linear layer that takes `seconds` for a batch of BATCH, and in proportion for fewer."""

    num_classes = CLASSES

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.layer = seconds, nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(self.layer(x), self.seconds * len(x) / BATCH)


class Late:
    """Work that is done `delay` after it was posted, at the earliest."""

    def __init__(self, work: Any, delay: float) -> None:
        self.work, self.end = work, time.perf_counter() + delay

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.end - time.perf_counter()))


def measured(
    mesh: Any, seconds: float, delay: float, parts: int, rounds: bool
) -> tuple[float, float]:
    """Median seconds of a step, and of its waits for logits."""
    torch.manual_seed(0)
    cohort = Cohort([Sleeper(seconds) for _ in range(2)], CLASSES)
    mesh.distribute(cohort)
    step: Any = make_step(
        cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), amp="off", mesh=mesh, accumulate=parts
    )
    step.exchange.in_rounds = rounds
    waits: list[float] = []
    post, wait = Transfer._post, Transfer.wait

    def late_post(transfer: Transfer, k: int) -> None:
        post(transfer, k)
        transfer.works[-1] = Late(transfer.works[-1], delay)  # type: ignore[assignment]

    def timed_wait(transfer: Transfer) -> dict[int, Tensor]:
        begin = time.perf_counter()
        found = wait(transfer)
        waits[-1] += time.perf_counter() - begin
        return found

    Transfer._post, Transfer.wait = late_post, timed_wait  # type: ignore[method-assign]
    times = []
    images, labels = torch.randn(BATCH, 8), torch.randint(CLASSES, (BATCH,))
    try:
        for _ in range(WARM + STEPS):
            dist.barrier()
            waits.append(0.0)
            begin = time.perf_counter()
            step(images, labels)
            times.append(time.perf_counter() - begin)
    finally:
        Transfer._post, Transfer.wait = post, wait  # type: ignore[method-assign]
    return statistics.median(times[WARM:]), statistics.median(waits[WARM:])


def left(seconds: float, delay: float, parts: int) -> float:
    """Seconds of waiting that a step cannot hide: forward passes and backward passes as they
    follow each other, a part's backward once its logits are there."""
    part, now, waited = seconds / parts, 0.0, 0.0
    there: list[float] = []  # when each part's logits are
    for i in range(parts + 1):
        if i < parts:
            now += part
            there.append(now + delay)
        if i > 0:
            waited += max(0.0, there[i - 1] - now)
            now = max(now, there[i - 1]) + 2 * part
    return waited


def rank(number: int, given: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(given.port),
    }  # fmt: skip
    torch.set_num_threads(1)
    mesh = make_mesh(2, timeout=60)
    rows: list[dict[str, Any]] = []
    forward = given.forward / 1e3
    for parts, rounds, delay in itertools.product((1, 2, 4), (False, True), given.delays):
        step, wait = measured(mesh, forward, delay / 1e3, parts, rounds)
        row = {
            "parts": parts,
            "receptions": "rounds" if rounds else "first",
            "delay": delay,
            "step": round(1e3 * step, 1),
            "waited": round(1e3 * wait, 1),
            "theory": round(1e3 * left(forward, delay / 1e3, parts), 1),
        }
        rows.append(row)
        if mesh.lead:
            print("".join(f"{value:>11}" for value in row.values()), flush=True)
    if mesh.lead and given.json:
        where = f"{report.machine(torch.device('cpu'))}, {os.cpu_count()} CPUs"
        found = {"forward": given.forward, "rows": rows, "where": where, "commit": report.commit()}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def table(forward: float, rows: list[dict[str, Any]], where: str, commit: str) -> str:
    """What a step waits in each number of parts, and what the order of its passes leaves."""
    waits = {(row["receptions"], row["parts"], row["delay"]): row for row in rows}
    parts, delays = ([*dict.fromkeys(row[name] for row in rows)] for name in ("parts", "delay"))
    lines = [
        f"{where}; commit {commit}",
        f"ms that a step waits, and in brackets what the order of its passes leaves; forward "
        f"{forward:g} ms, backward {2 * forward:g}",
        "",
        f"{'a link that is late by':<26}" + "".join(f"{f'{d:g} ms':>15}" for d in delays),
    ]
    for number in parts:
        cells = [waits["first", number, delay] for delay in delays]
        texts = [f"{cell['waited']:.1f} ({cell['theory']:.1f})" for cell in cells]
        name = "a batch at once" if number == 1 else f"accumulate {number}"
        lines.append(f"{name:<26}" + "".join(f"{text:>15}" for text in texts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 5, 10, 20, 40], help="ms")
    parser.add_argument("--forward", type=float, default=20, help="ms of a batch's forward pass")
    parser.add_argument("--port", type=int, default=29571)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a stored file, no more")
    given = parser.parse_args()
    report.check_writable(parser, given.json)
    if given.table:
        print(table(**json.loads(given.table.read_text())))
        return
    print(f"ms, median of {STEPS} steps; forward {given.forward:g}, backward {2 * given.forward:g}")
    names = ("parts", "receptions", "delay", "step", "waited", "theory")
    print("".join(f"{name:>11}" for name in names))
    mp.spawn(rank, (given,), nprocs=2)


if __name__ == "__main__":
    main()
