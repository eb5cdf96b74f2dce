"""Seconds from the start of a training until its networks reach an accuracy on the test set.

python -m bench.time_to_accuracy [--device cuda] [--epochs 5] [--data DIR] [--json FILE]   measures
python -m bench.time_to_accuracy --table FILE                                  prints a stored one

Two ResNet-32 learn from each other on CIFAR-100 for a few epochs of batches of 64, the learning
rate falling from 0.1 as half a cosine, and are evaluated after each. Ours is
`fastdml.train.cifar100` as a user calls it, from the call on: images laid out, execution chosen by
measurement, log, checkpoint and weights written. The usual loop is that of most repositories
(`fastdml.machine.pairwise`) behind a DataLoader of per-image transforms in two workers, in float32,
from its first batch on; images are read for both before. Both begin with the same weights; what is
drawn for batches differs. One run of each: accuracies differ by a few tenths of a point by chance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench import report, timing
from bench.baselines import data_loader
from fastdml import Cohort, train
from fastdml.data import load_cifar100
from fastdml.machine import pairwise

PEERS = ("resnet32", "resnet32")
BATCH, RATE = 64, 0.1
TARGETS = (20, 25, 30, 35, 40, 45, 50, 55)  # percent, mean of both networks
Points = list[tuple[float, float]]  # seconds since the start and percent, after each epoch


def our_points(root: str, device: torch.device, epochs: int, subset: int) -> Points:
    points: Points = []
    with TemporaryDirectory() as folder:
        started = time.perf_counter()

        class Note(train.Callback):
            def on_evaluation(self, event: train.EvaluationEvent) -> None:
                points.append((time.perf_counter() - started, 100 * event.mean))

        train.cifar100(
            peers=PEERS, batch_size=BATCH, lr=RATE, schedule="cosine", epochs=epochs, eval_every=1,
            subset=subset, root=root, device=str(device), folder=f"{folder}/run",
            tensorboard=False, figures=(), callbacks=[Note()],
        )  # fmt: skip
    return points


def usual_points(root: str, device: torch.device, epochs: int, subset: int) -> Points:
    images, test = load_cifar100(root)
    images = images.subset(subset) if subset else images
    cohort = Cohort(PEERS, images.num_classes, seed=0).to(device)
    loop = pairwise.Loop(
        cohort.peers,
        lambda w: torch.optim.SGD(w, RATE, momentum=0.9, weight_decay=5e-4, nesterov=True),
    )
    batches = data_loader.loader(images, BATCH, device)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, epochs * len(batches))
        for each in loop.optimizers
    ]
    points: Points = []
    timing.wait(device)
    started = time.perf_counter()
    for _ in range(epochs):
        cohort.train()
        for x, y in batches:
            loop(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
            for each in schedules:
                each.step()
        top1 = train.evaluate(cohort, test, amp="off").top1
        points.append((time.perf_counter() - started, 100 * sum(top1) / len(top1)))
    return points


def reached(points: Points, target: float) -> float | None:
    """Seconds until the first evaluation at or above it."""
    return next((seconds for seconds, percent in points if percent >= target), None)


def table(points: dict[str, Points], where: str, epochs: int, subset: int, **_: object) -> str:
    lines = [where, "", f"2 ResNet-32 on CIFAR-100, {epochs} epochs of batches of 64"]
    if subset:
        lines.append(f"scaled down: {subset} training images")
    lines += ["", f"{'seconds until test top-1':<26}{'ours':>8}{'usual loop':>12}{'ratio':>8}"]
    for target in TARGETS:
        ours, usual = (reached(points[name], target) for name in ("fastdml.train", "usual loop"))
        if ours or usual:
            cells = [f"{each:.1f}" if each else "-" for each in (ours, usual)]
            ratio = f"{usual / ours:.1f}" if ours and usual else "-"
            lines.append(f"{f'{target} %':<26}{cells[0]:>8}{cells[1]:>12}{ratio:>8}")
    lines.append("")
    for name, each in points.items():
        text = ", ".join(f"{seconds:.1f} s {percent:.1f} %" for seconds, percent in each)
        lines.append(f"{name}, after each epoch: {text}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--subset", type=int, default=0, help="training images (default: all)")
    parser.add_argument("--data", default="data", help="folder of CIFAR-100 (default: data)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--table", type=Path, help="print this file's figures")
    chosen = parser.parse_args(arguments)
    report.check_writable(parser, chosen.json)
    if chosen.epochs < 1 or chosen.subset < 0:
        parser.error("--epochs must be 1 or more, and --subset 0 or more")
    if chosen.table:
        found = json.loads(chosen.table.read_text())
    else:
        device = torch.device(chosen.device)
        what = (chosen.data, device, chosen.epochs, chosen.subset)
        load_cifar100(chosen.data)  # the files are in the system's cache for both
        if device.type == "cuda":
            torch.zeros((), device=device)  # the context is there for both
        found = {
            "where": report.machine(device), "versions": report.versions(device),
            "commit": report.commit(), "epochs": chosen.epochs, "subset": chosen.subset,
            "points": {"fastdml.train": our_points(*what), "usual loop": usual_points(*what)},
        }  # fmt: skip
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(**found))


if __name__ == "__main__":
    main()
