"""What goes wrong when peers are trained and compared, built in on purpose and measured.

python -m bench.traps [--only NAME ...] [--seeds N] [--root DIR] [--to FILE]

Each measurement is a function of a seed to numbers, in `MEASUREMENTS`; what it finds goes into the
file (results/traps.json) at once, and a later call measures what is missing there. Peers are two
ResNet-8 on 200 of the digits' training images, 20 epochs, unless a measurement says otherwise; the
steps are the library's own (`make_step`), in float32 on one thread. A score is the top-1 accuracy
on the 355 test images, in percent, averaged over the peers. All takes some minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.traps_page import RESULTS, UNTRAINED
from fastdml import Cohort, MutualLoss, data
from fastdml.data import make_loader
from fastdml.devices import device_name
from fastdml.engine import Schedule, learning_rates, make_optimizer, make_step
from fastdml.files import write_atomically
from fastdml.models import create_model
from fastdml.reproduce.provenance import provenance_of

IMAGES, BATCH, EPOCHS, HELD_OUT = 200, 64, 20, 400
BUDGETS = (1, 2, 5, 10, 20, 40)
ALONE = {"kl_weight": 0.0}
Numbers = dict[str, float]


class Digits(NamedTuple):
    train: data.ImageSet
    test: tuple[Tensor, Tensor]  # images (N, 1, 8, 8) as peers take them, labels (N,)
    held_out: tuple[Tensor, Tensor]  # training images that nobody trains on


def _all_of(images: data.ImageSet) -> tuple[Tensor, Tensor]:
    return next(iter(make_loader("resident", images, len(images), train=False).epoch(0)))


@cache
def digits(seed: int) -> Digits:
    whole, test = data.load("digits")
    train = whole.subset(IMAGES, seed)
    used = {image.numpy().tobytes() for image in train.images}
    inputs, labels = _all_of(whole)
    rest = [i for i, image in enumerate(whole.images) if image.numpy().tobytes() not in used]
    rest = rest[:: len(rest) // HELD_OUT][:HELD_OUT]
    return Digits(train, _all_of(test), (inputs[rest], labels[rest]))


class Trained(NamedTuple):
    cohort: Cohort
    divergence: list[float]  # mean KL between the peers of each step, nats
    top1: list[tuple[list[float], list[float]]]  # of each epoch watched: test, held out


def logits_of(cohort: Cohort, inputs: Tensor) -> Tensor:
    """(K, N, C), of peers in evaluation mode."""
    cohort.eval()
    with torch.no_grad():
        found = torch.stack([peer(inputs) for peer in cohort.peers])
    cohort.train()
    return found


def accuracies(cohort: Cohort, images: tuple[Tensor, Tensor]) -> list[float]:
    """Of each peer, in percent."""
    inputs, labels = images
    right = logits_of(cohort, inputs).argmax(2) == labels
    return (100 * right.double().mean(1)).tolist()


def trained(
    seed: int,
    *,
    peers: int = 2,
    epochs: int = EPOCHS,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    identical: bool = False,
    teacher: nn.Module | None = None,
    watch: bool = False,
    constant: bool = False,
    first: int = 0,
    **loss: Any,
) -> Trained:
    """Peers after training. identical: all begin with the first one's weights. teacher: a frozen
    network that teaches too. watch: score each epoch. constant: the learning rate, in place of half
    a cosine. first: added to the seed of the initial weights. loss: of `MutualLoss`."""
    found = digits(seed)
    loader = make_loader("resident", found.train, BATCH, seed=seed, train=True, pad=1, flip=False)
    taught = {} if teacher is None else {"teachers": [teacher]}
    cohort = Cohort(["resnet8"] * peers, 10, in_channels=1, seed=seed + first, **taught)
    if identical:  # Cohort itself refuses such peers
        for peer in list(cohort.peers)[1:]:
            peer.load_state_dict(cohort.peers[0].state_dict())
    optimizer = make_optimizer(cohort, lr=lr, weight_decay=weight_decay)
    rates = learning_rates(lr=lr, epochs=epochs, steps=len(loader), schedule="cosine")
    schedule = Schedule(optimizer, torch.full_like(rates, lr) if constant else rates)
    step = make_step(cohort, MutualLoss(**loss), optimizer, amp="off", execution="eager")
    divergence, top1 = [], []
    cohort.train()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            divergence.append(float(step(*batch).stats.kl[: len(cohort)].mean()))
            schedule.advance()
        if watch:
            top1.append((accuracies(cohort, found.test), accuracies(cohort, found.held_out)))
    return Trained(cohort, divergence, top1)


@cache
def usual(seed: int, mutual: bool) -> Trained:
    return trained(seed, **({} if mutual else ALONE))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def score(found: Trained, seed: int) -> float:
    return mean(accuracies(found.cohort, digits(seed).test))


def apart(found: Trained, seed: int) -> float:
    """Mean KL between the peers on the test images, nats."""
    inputs, labels = digits(seed).test
    _, stats = MutualLoss(return_stats=True)(logits_of(found.cohort, inputs), labels)
    return float(stats.kl.mean())


def both(seed: int) -> Numbers:
    return {
        "independent": score(usual(seed, False), seed),
        "mutual": score(usual(seed, True), seed),
    }


# ---- the measurements, each a function of the seed


def budgets(seed: int) -> Numbers:
    found = {}
    for epochs in BUDGETS:
        for name, loss in (("independent", ALONE), ("mutual", {})):
            run = (
                usual(seed, not loss) if epochs == EPOCHS else trained(seed, epochs=epochs, **loss)
            )
            found[f"{name}, {epochs} epochs"] = score(run, seed)
    return found


def class_mean(seed: int) -> Numbers:
    weak = trained(seed, kl_weight=1 / 10)
    return {
        **both(seed),
        "mean over classes": score(weak, seed),
        "apart, independent": apart(usual(seed, False), seed),
        "apart, mutual": apart(usual(seed, True), seed),
        "apart, mean over classes": apart(weak, seed),
    }


def detach(seed: int) -> Numbers:
    joined = trained(seed, detach_targets=False)
    return {
        **both(seed),
        "not detached": score(joined, seed),
        "apart, mutual": apart(usual(seed, True), seed),
        "apart, not detached": apart(joined, seed),
    }


def identical(seed: int) -> Numbers:
    mutual, alone = (trained(seed, identical=True, **loss) for loss in ({}, ALONE))
    states = (mutual.cohort.state_dict(), alone.cohort.state_dict())
    gaps = [float((states[0][n].double() - v.double()).abs().max()) for n, v in states[1].items()]
    return {
        **both(seed),
        "identical, mutual": score(mutual, seed),
        "identical, independent": score(alone, seed),
        "largest divergence of a step": max(mutual.divergence),
        "largest difference of a weight": max(gaps),
    }


def baselines(seed: int) -> Numbers:
    return {
        **both(seed),
        "a tenth of the rate": score(trained(seed, lr=0.01, **ALONE), seed),
        "no weight decay": score(trained(seed, weight_decay=0.0, **ALONE), seed),
        "half of the epochs": score(trained(seed, epochs=EPOCHS // 2, **ALONE), seed),
    }


def best_epoch(seed: int) -> Numbers:
    """At a constant rate, as before the paper's first drop."""
    found = {}
    for name, loss in (("independent", ALONE), ("mutual", {})):
        epochs = trained(seed, watch=True, constant=True, **loss).top1
        test, held_out = (torch.tensor([e[i] for e in epochs]) for i in (0, 1))  # (epochs, K)
        chosen = held_out.argmax(0)
        found[f"{name}, last epoch"] = float(test[-1].mean())
        found[f"{name}, best on held-out images"] = float(test.gather(0, chosen[None]).mean())
        found[f"{name}, best on the test images"] = float(test.amax(0).mean())
    return found


def mean_of_means(seed: int) -> Numbers:
    """Batches of 64 of 355 images: the last has 35, whose images count 1.8 times. And a batch's
    gradient from the means of two unequal parts, 24 and 8 of 32 images."""
    found, (inputs, labels) = usual(seed, False), digits(seed).test
    z = logits_of(found.cohort, inputs)[0]
    hits, nll = (z.argmax(1) == labels).double(), F.cross_entropy(z, labels, reduction="none")
    at = range(0, len(labels), 64)
    accuracy = mean([float(hits[i : i + 64].mean()) for i in at])
    loss = mean([float(nll[i : i + 64].mean()) for i in at])
    x, y = (t[:32] for t in digits(seed).held_out)
    peer = found.cohort.peers[0].eval()

    def gradient(*parts: slice) -> Tensor:
        peer.zero_grad()
        for part in parts:
            (F.cross_entropy(peer(x[part]), y[part]) / len(parts)).backward()
        return torch.cat([p.grad.flatten() for p in peer.parameters()])

    whole, parts = gradient(slice(32)), gradient(slice(24), slice(24, 32))
    return {
        "accuracy, of batches": 100 * accuracy,
        "accuracy, of images": 100 * float(hits.mean()),
        "error of the accuracy": abs(100 * accuracy - 100 * float(hits.mean())),
        "error of the loss, percent": 100 * abs(loss / float(nll.mean()) - 1),
        "error of the gradient, percent": 100 * float((parts - whole).norm() / whole.norm()),
    }


def temperature(seed: int) -> Numbers:
    inputs, labels = digits(seed).test
    z = logits_of(usual(seed, False).cohort, inputs)
    sizes = {}
    for name, options in TEMPERATURES.items():
        _, _, grads = MutualLoss(ce_weight=0.0, **options).value_and_grad(z, labels)
        sizes[f"KL gradient, {name}"] = float(torch.cat([g for g in grads if g is not None]).norm())
    unit = sizes["KL gradient, T = 1"]
    scores = {name: score(trained(seed, **o), seed) for name, o in TEMPERATURES.items() if o}
    return {**both(seed), **scores, **{name: size / unit for name, size in sizes.items()}}


TEMPERATURES: dict[str, dict[str, float]] = {
    "T = 1": {},
    "T = 4, with T squared": {"temperature": 4.0},
    "T = 4, without": {"temperature": 4.0, "kl_weight": 1 / 16},
}


def direction(seed: int) -> Numbers:
    return {**both(seed), "reverse": score(trained(seed, divergence="reverse"), seed)}


def peer_sum(seed: int) -> Numbers:
    found = {"independent": score(usual(seed, False), seed)}
    for name, weight in (("mean over peers", 1.0), ("sum over peers", 3.0)):
        run = trained(seed, peers=4, kl_weight=weight)
        found[name] = score(run, seed)
        found[f"apart, {name}"] = apart(run, seed)
    return found


def ensemble(seed: int) -> Numbers:
    inputs, labels = digits(seed).test
    found = {}
    for name, mutual in (("independent", False), ("mutual", True)):
        run = usual(seed, mutual)
        p = logits_of(run.cohort, inputs).softmax(2).mean(0)
        found[f"one {name} peer"] = score(run, seed)
        found[f"ensemble, {name}"] = 100 * float((p.argmax(1) == labels).double().mean())
    return found


class InTrainMode(nn.Module):
    """A network as it runs in training, in whatever mode its owner sets: the trap itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.train()(x)


def teacher_mode(seed: int) -> Numbers:
    """A frozen teacher whose BatchNorm takes the batch's statistics."""
    student: Any = {"peers": 1, "first": 1000}
    teacher = trained(seed, peers=1, **ALONE).cohort.peers[0]
    found = {"no teacher": score(trained(seed, **student, **ALONE), seed)}
    found["taught in eval mode"] = score(trained(seed, **student, teacher=teacher), seed)
    moved = trained(seed, **student, teacher=InTrainMode(teacher))
    return {**found, "taught in train mode": score(moved, seed)}


def mean_as_target(seed: int) -> Numbers:
    """DML and DML_e with three peers."""
    dml, dml_e = (trained(seed, peers=3, target=target) for target in ("peers", "ensemble"))
    states = (dml.cohort.state_dict(), dml_e.cohort.state_dict())
    gaps = [float((states[0][n].double() - v.double()).abs().max()) for n, v in states[1].items()]
    return {
        "DML": score(dml, seed),
        "DML_e": score(dml_e, seed),
        "largest difference of a weight": max(gaps),
        "KL term, DML": mean(dml.divergence[-3:]),
        "KL term, DML_e": mean(dml_e.divergence[-3:]),
    }


FORMS = {  # of MobileNet: layers that get stride 2, the stem and that of the 64 -> 128 block
    "CIFAR form": (),
    "64 -> 128 block of stride 2": (3,),
    "ImageNet stem and block": (0, 3),
}


def mobilenet(seed: int) -> Numbers:
    """The library's MobileNet for CIFAR beside what other strides make of it, on a 32x32 image. Of
    these numbers none depends on the seed, and none on weights."""
    found = {}
    for name, strides in FORMS.items():
        network: Any = create_model("mobilenet", num_classes=100).eval()
        for at in strides:
            network.features[at][0].stride = (2, 2)
        work = 0

        def count(module: Any, _: Any, out: Tensor) -> None:
            nonlocal work
            work += out.numel() * module.weight[0].numel()  # multiply-adds of an output, times them

        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        with torch.no_grad():
            last = network.forward_features(torch.zeros(1, 3, 32, 32))
            network.head(last.mean((2, 3)))
        found |= {
            f"parameters, {name}": float(sum(p.numel() for p in network.parameters())),
            f"multiply-adds, {name}": float(work),
            f"side of the last map, {name}": float(last.shape[2]),
        }
    return found


TRAINED = "mobilenet-trained"  # takes --root, and minutes
IMAGES_OF_CIFAR, EPOCHS_OF_CIFAR = 1600, 4


def short_training(seed: int, root: str) -> Numbers:
    """The first two forms on the same few batches of CIFAR-100, without each other."""
    train, test = data.load("cifar100", root)
    train, test = train.subset(IMAGES_OF_CIFAR, seed), test.subset(1000)
    loader = make_loader("resident", train, 64, seed=seed, train=True)
    forms = list(FORMS)[:2]
    cohort = Cohort(["mobilenet"] * len(forms), 100, seed=seed)
    for peer, form in zip(cohort.peers, forms, strict=True):
        for at in FORMS[form]:
            peer.features[at][0].stride = (2, 2)
    cohort.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(cohort, lr=0.1, weight_decay=5e-4)
    rates = learning_rates(lr=0.1, epochs=EPOCHS_OF_CIFAR, steps=len(loader), schedule="cosine")
    schedule = Schedule(optimizer, rates)
    step = make_step(cohort, MutualLoss(**ALONE), optimizer, amp="off", execution="eager")
    cohort.train()
    for epoch in range(EPOCHS_OF_CIFAR):
        for batch in loader.epoch(epoch):
            loss = step(*batch).stats.ce
            schedule.advance()
    found = dict(zip(forms, accuracies(cohort, _all_of(test)), strict=True))
    last = {f"last cross-entropy, {form}": float(ce) for form, ce in zip(forms, loss, strict=True)}
    return {**found, **last}


MEASUREMENTS: Mapping[str, Callable[[int], Numbers]] = {
    "budgets": budgets,
    "class-mean": class_mean,
    "detach": detach,
    "identical": identical,
    "baselines": baselines,
    "best-epoch": best_epoch,
    "mean-of-means": mean_of_means,
    "temperature": temperature,
    "direction": direction,
    "peer-sum": peer_sum,
    "ensemble": ensemble,
    "teacher-mode": teacher_mode,
    "mean-as-target": mean_as_target,
    "mobilenet": mobilenet,
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"measurements": {}}


def measure_all(wanted: Mapping[str, tuple[Callable, Sequence[int]]], to: Path) -> None:
    """Measures what the file lacks, writing it after each seed of each measurement."""
    for seed in sorted({seed for _, seeds in wanted.values() for seed in seeds}):
        for name, (function, seeds) in wanted.items():
            stored = read(to)
            done = stored["measurements"].setdefault(name, {})
            if seed not in seeds or str(seed) in done:
                continue
            start = time.process_time()
            numbers = function(seed)
            seconds = round(time.process_time() - start, 1)
            stored = read(to)
            done = stored["measurements"].setdefault(name, {})
            done[str(seed)] = {"values": numbers, "seconds": seconds}
            every = [one for found in stored["measurements"].values() for one in found.values()]
            spent = sum(one["seconds"] for one in every)
            device = device_name(torch.device("cpu"), torch.get_num_threads())
            command = "python -m bench.traps --root data"
            stored["provenance"] = provenance_of(command, device=device, seconds=spent)
            to.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(to, json.dumps(stored, indent=1) + "\n")
            print(f"{name}, seed {seed}: {seconds} s", flush=True)
        digits.cache_clear()
        usual.cache_clear()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traps", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*MEASUREMENTS, TRAINED])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", help="folder of CIFAR-100, for mobilenet-trained")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    logging.getLogger("fastdml").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    wanted: dict[str, tuple[Callable, Sequence[int]]] = {
        name: (function, range(args.seeds if name != UNTRAINED else 1))
        for name, function in MEASUREMENTS.items()
    }
    if args.root:
        wanted[TRAINED] = (partial(short_training, root=args.root), range(1))
    if args.only:
        wanted = {name: wanted[name] for name in args.only}
    measure_all(wanted, args.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
