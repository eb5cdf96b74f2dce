"""What a call of the loss costs the host, measured without a GPU.

python -m bench.host_time [--before CHECKOUT] [--json FILE]      prints the table
python -m bench.host_time --table FILE                           prints a stored one

Small batches are done sooner on a GPU than the host has launched them, and then the host's time is
the loss's. Ours is measured on the stand-in for the CUDA driver (`bench/stand_in`): all that runs
on a GPU's host, but for the driver's own launch. The rival is torch.compile of the formula in
closed form: its guards, its autograd and the generated code's Python, taken from its code for CPUs
on so few logits that their arithmetic takes no time. For a GPU that code launches kernels, which is
not in these figures: they are a lower bound.

Microseconds of the processor (the thread's, which other processes hardly change), the least of all
rounds. Each contender has processes of its own, which take turns. --before is another checkout of
this repository, measured beside this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((2, 64, 100), (8, 64, 100))  # K, N, C
NO_ARITHMETIC = (2, 3)  # N, C where the arithmetic is done and not launched
CALLS, ROUNDS, TURNS = 1000, 7, 3
MEASURES = ("launch", "forward", "forward + sum + backward", "value_and_grad")

Times = dict[str, float]  # microseconds by measure and K


def inputs(K: int, N: int, C: int) -> tuple[list[Tensor], Tensor]:
    """K logits that want gradients, and labels."""
    return [torch.randn(N, C).requires_grad_() for _ in range(K)], torch.randint(C, (N,))


def our_calls(K: int, N: int, C: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name in `MEASURES`."""
    from fastdml_kernels.launch import launch
    from fastdml_kernels.options import Options

    from fastdml import MutualLoss, mutual_loss

    logits, labels = inputs(K, N, C)
    fixed, options, loss = [z.detach() for z in logits], Options(), MutualLoss()
    grads = [torch.empty_like(z) for z in fixed]
    calls = (
        lambda: launch(fixed, labels, options, grads=grads),
        lambda: mutual_loss(logits, labels),
        lambda: _backward(mutual_loss(logits, labels), logits),
        lambda: loss.value_and_grad(logits, labels),
    )
    return dict(zip(MEASURES, calls, strict=True))


def compiled_calls(K: int, N: int, C: int) -> dict[str, Callable[[], Any]]:
    """The same of torch.compile, which has no launch of its own to call."""
    from bench.baselines import closed_form

    losses = torch.compile(closed_form.losses, dynamic=False)
    logits, labels = inputs(K, N, C)
    calls = (
        lambda: losses(logits, labels),
        lambda: _backward(losses(logits, labels), logits),
        lambda: torch.autograd.grad(losses(logits, labels).sum(), logits),
    )
    return dict(zip(MEASURES[1:], calls, strict=True))


def _backward(losses: Tensor, logits: Sequence[Tensor]) -> None:
    losses.sum().backward()
    for z in logits:
        z.grad = None


def our_times() -> Times:
    from bench import stand_in

    stand_in.start()
    return {_key(n, K): _time(f) for K, N, C in SHAPES for n, f in our_calls(K, N, C).items()}


def compiled_times() -> Times:
    torch.set_num_threads(1)
    return {
        _key(name, K): _time(call)
        for K, *_ in SHAPES
        for name, call in compiled_calls(K, *NO_ARITHMETIC).items()
    }


def _key(name: str, K: int) -> str:
    return f"{name}, K = {K}"


def _time(call: Callable[[], Any]) -> float:
    for _ in range(30):
        call()
    rounds = timeit.repeat(call, timer=time.thread_time, number=CALLS, repeat=ROUNDS)
    return 1e6 * min(rounds) / CALLS


def measure(before: Path | None = None) -> dict[str, Times]:
    """The times of each contender, by its column of the table."""
    contenders = {
        **({} if before is None else {"before": ("our_times", before.resolve())}),
        "now": ("our_times", ROOT),
        "torch.compile": ("compiled_times", ROOT),
    }
    turns = [
        {name: _in_process(*what) for name, what in contenders.items()} for _ in range(TURNS)
    ]  # fmt: skip
    return {
        name: {key: min(turn[name][key] for turn in turns) for key in turns[0][name]}
        for name in contenders
    }


def _in_process(function: str, checkout: Path) -> Times:
    """What a function of this module measures of a checkout, in a process of its own."""
    paths = (checkout, checkout / "kernels", ROOT)
    code = f"import json; from bench import host_time; print(json.dumps(host_time.{function}()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "TRITON_INTERPRET": "0",
             "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def table(times: dict[str, Times], where: str) -> str:
    """The table, under the line that says where it was measured."""
    lines = [
        where,
        "",
        "host time of a call in microseconds, (K, 64, 100) logits",
        f"{'':<32}{'K':>3}" + "".join(f"{name:>15}" for name in times),
    ]
    for K, *_ in SHAPES:
        for name in MEASURES:
            cells = [column.get(_key(name, K)) for column in times.values()]
            shown = ["-" if us is None else f"{us:.1f}" for us in cells]
            lines.append(f"{name:<32}{K:>3}" + "".join(f"{cell:>15}" for cell in shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="another checkout, measured as well")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--table", type=Path, help="file of figures to print, nothing is measured")
    chosen = parser.parse_args()
    if chosen.before:
        chosen.before = chosen.before.resolve()
        if not (chosen.before / "kernels" / "fastdml_kernels").is_dir():
            parser.error(f"--before {chosen.before} is no checkout of this repository")
    report.check_writable(parser, chosen.json)
    if chosen.table:
        found = json.loads(chosen.table.read_text())
    else:
        found = {"times": measure(chosen.before), "where": report.machine(torch.device("cpu"))}
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(**found))


if __name__ == "__main__":
    main()
